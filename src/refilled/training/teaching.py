"""The teachers' part of a training step: their outputs for a batch, live, from a cache or from a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from refilled.data import Task
from refilled.models import Backbone, refuse_non_finite
from refilled.outputs import Outputs, not_computed
from refilled.stages import Stage, needs_training_set
from refilled.training.cuda_graphs import GraphedNetwork
from refilled.training.distributed import World
from refilled.training.evaluation import embed
from refilled.training.heads import heads_read_teacher
from refilled.training.teacher_cache import TeacherCache

Graphed = Callable[[Backbone], GraphedNetwork | None]


class Teaching:
    """A frozen teacher, and what the terms of the present stage read of its outputs.

    Args:
        number: Its number among the teachers of the run, from 0.
        teacher: The teacher; it is moved to the device.
        cache: Its embeddings on disk, if the run uses them.
        fabric: The device and precision.
        world: The processes of the run.
    """

    def __init__(
        self, number: int, teacher: Backbone, cache: TeacherCache | None, fabric: Fabric, world: World
    ) -> None:
        self.number, self.teacher, self.cache, self.fabric, self.world = number, teacher, cache, fabric, world
        teacher.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def enter(self, stage: Stage, graphed: Graphed) -> None:
        """Begin a stage, with a new recording of the teacher's passes where ``graphed`` gives one."""
        self.stage = stage.taught_by(self.number)
        self.parts = frozenset(term.teacher for term in self.stage.terms.values() if term.teacher is not None)
        self.graphed = graphed(self.teacher)

    def __call__(self, images: Tensor, batch: Tensor, view: int) -> Outputs | None:
        """Return the outputs that the stage reads, for the whole batch; None if it reads none.

        Args:
            images: This process's part of the batch, augmented.
            batch: Indices of all images of the batch ``(N,)``.
            view: Number of the view.
        """
        if not self.stage.needs_teacher:
            return None
        if self.cache is not None and self.stage.embedding_suffices:
            return self._outputs(self.cache(view, batch).to(self.fabric.device))
        if self.graphed is not None:
            return self.graphed(images, self.parts)
        with torch.no_grad(), self.fabric.autocast():
            taught = cast(Outputs, self.teacher(images, features="features" in self.parts))
        return self.world.gather_outputs(taught, len(batch), self.parts)

    def precompute(self, task: Task, for_heads: bool = False) -> Outputs | None:
        """Embed the whole training set for the losses of the stage that need it, and for its heads.

        Args:
            task: The run's task.
            for_heads: Whether the stage begins with its heads alone, whose losses may read all these outputs.

        Returns:
            The outputs that those losses read, the unlabelled images last; None if there are none.
        """
        terms = [term for term in self.stage.terms.values() if needs_training_set(term.loss)]
        for_heads = for_heads and heads_read_teacher(self.stage)
        if not terms and not for_heads:
            return None
        embedding = embed_seen(self.teacher, task, self.fabric, self.world)
        refuse_non_finite(embedding, [task.source_of(row) for row in range(len(embedding))])
        labels = task.seen.labels.to(self.fabric.device, copy=True)
        for term in terms:
            assert needs_training_set(term.loss)
            shown = len(labels) if term.sees_unlabelled else len(task.train)
            term.loss.precompute(embedding[:shown], labels[:shown])
        return self._outputs(embedding) if for_heads else None

    def _outputs(self, embedding: Tensor) -> Outputs:
        """Return the embedding, and the logits that follow from it if the stage reads them."""
        if not self.stage.reads("logits"):
            return Outputs(not_computed(len(embedding), embedding), embedding)
        with torch.no_grad(), self.fabric.autocast():
            return Outputs(self.teacher.classifier(embedding), embedding)

    def refuse_sick(self, taught: Outputs, sources: Sequence[str], hint: str) -> None:
        """Blame the teacher, and name the images, where it is its outputs that are not finite."""
        refuse_non_finite(taught.embedding, sources, "embedding", hint)
        for what, rows in (("logits", taught.logits), *(("feature map", maps) for maps in taught.features)):
            if len(rows) == len(sources):
                refuse_non_finite(rows, sources, what, hint)


def embed_seen(model: Backbone, task: Task, fabric: Fabric, world: World) -> Tensor:
    """Return the embeddings ``(N, d)`` of all images in a run, without augmentation, the unlabelled ones last."""
    parts = [task.train, *([task.unlabelled] if task.unlabelled is not None else [])]
    with fabric.autocast():
        return torch.cat([embed(model, part.pixels, fabric.device, world) for part in parts]).to(fabric.device)
