"""Other libraries' distillation steps beside ours in ``step.py``: the same networks and the same views.

A timm network is timm's own here. Ours is the same one with other convolutions (``models/mixed_convolution.py``).
Images are normalised once per step, with the student's mean and deviation.

lightly-train's steps are those of its classes ``Distillation`` (method ``distillationv1``) and ``DistillationV3`` (its
default), with their mixup, projections, queue, optimisers (LARS, AdamW) and clipped gradients, without Lightning's
trainer around them. They take networks of timm only.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from scene import CLASSES, FAST, FLOAT32, PLAIN, SGD, Batches, Scene, Setting, Step, bare
from torch import Tensor, nn

from refilled.models import Backbone
from refilled.models.timm_backbone import timm_model
from refilled.outputs import Outputs


class LeftOutError(Exception):
    """A peer cannot take these networks."""


def authors(scene: Scene) -> Step:
    """Stage 1 as in the authors' repository."""
    from pytorch_metric_learning.miners import TripletMarginMiner

    miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")

    def probabilities(embedding: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        anchor, positive, negative = (embedding[rows] for rows in triplets)
        gap = (F.pairwise_distance(anchor, negative) - F.pairwise_distance(anchor, positive)) / 4
        return torch.cat([gap.sigmoid(), (-gap).sigmoid()])[:, None]

    def objective(seen: Outputs, taught: Outputs, labels: Tensor) -> Tensor:
        student, teacher = F.normalize(seen.embedding), F.normalize(taught.embedding)
        triplets = miner(student, labels)
        target = probabilities(teacher, triplets)
        return 1000 * F.kl_div(probabilities(student, triplets).log(), target, reduction="batchmean")

    return bare(scene, objective, scene.drawn(), setting=PLAIN)


class ForTimm(nn.Module):
    """A network of ours with the names that timm's tasks ask for; it takes normalised images."""

    pretrained_cfg: Mapping[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    in_chans = 3

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network, self.num_classes, self.num_features = network, network.num_classes, network.embedding_dim

    def forward_features(self, images: Tensor) -> Tensor:
        return self.network.embed(images)[0]

    def forward_head(self, embedding: Tensor, pre_logits: bool = False) -> Tensor:
        return embedding if pre_logits else self.network.classifier(embedding)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def networks(scene: Scene, setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Return student and teacher as a user of timm has them.

    Raises:
        LeftOutError: A network resizes images to another size, which peers leave to their data loaders.
    """
    found = []
    for ours in (scene.student(setting), scene.teacher(setting)):
        if ours.input_size not in (None, scene.task.image_size):
            raise LeftOutError(f"{ours.architecture} takes images of {ours.input_size} pixels")
        if ours.architecture is not None and ours.architecture.startswith("timm/"):
            theirs = timm_model(ours.architecture.removeprefix("timm/"), num_classes=CLASSES)
            found.append(theirs.to(scene.device, memory_format=setting.layout))
        else:
            found.append(ForTimm(ours))
    return found[0].train(), found[1].eval().requires_grad_(False)


def normalised(scene: Scene, setting: Setting) -> Batches:
    """The batches of a run as a peer's data loader gives them, in the layout of its networks."""
    normalise = scene.student().normalize
    return ((normalise(images).contiguous(memory_format=setting.layout), labels) for images, labels in scene.drawn())


def of_timm(name: str, scene: Scene, setting: Setting) -> Step:
    """A step of timm's training script with one of its distillation tasks."""
    from timm.task import distillation

    student, teacher = networks(scene, setting)
    batches = normalised(scene, setting)
    task = getattr(distillation, name)(student, teacher, nn.CrossEntropyLoss(), verbose=False).to(scene.device).train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], **SGD)

    def step() -> None:
        images, labels = next(batches)
        with scene.autocast(setting):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_torchdistill(scene: Scene, setting: Setting) -> Step:
    from torchdistill.core.distillation import get_distillation_box

    modules = {f"{one}_module_{part}": value for one in ("student", "teacher") for part, value in _TORCHDISTILL.items()}
    loss = {"key": "KDLoss", "kwargs": {**modules, "temperature": 4.0, "alpha": 0.1}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    student, teacher = networks(scene, setting)
    box = get_distillation_box(teacher, student, {}, config, scene.device, None, False, 1.0)
    batches = normalised(scene, setting)

    def step() -> None:
        images, labels = next(batches)
        with scene.autocast(setting):
            loss = box.forward_process(images, labels)
        box.post_forward_process(loss)

    return step


_TORCHDISTILL = {"path": ".", "io": "output"}


def of_lightly(version: str, scene: Scene, setting: Setting) -> Step:
    """A step of a class of lightly-train; ``version`` is ``v1`` or ``v3``."""
    from lightly_train._methods.distillation import distillation as v1
    from lightly_train._methods.distillationv3 import distillationv3 as v3
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._models.timm.timm import TIMMModelWrapper
    from lightly_train._optim import optimizer_helpers

    student, teacher = networks(scene, setting)
    if isinstance(student, ForTimm) or isinstance(teacher, ForTimm):
        raise LeftOutError("lightly-train takes networks of timm, not ours")
    if version == "v1":
        v1.get_teacher = lambda *_, **__: _for_lightly(teacher)  # it builds only DINO's networks itself
        kind, arguments = v1.Distillation, v1.DistillationArgs(queue_size=_QUEUE)
    else:
        kind, arguments = v3.DistillationV3, v3.DistillationV3Args(queue_size=_QUEUE, teacher=teacher)
    optim = kind.optimizer_args_cls("auto")()
    wrapped = TIMMModelWrapper(student)
    optim.resolve_auto(wrapped_model=wrapped)
    method = kind(arguments, optim, EmbeddingModel(wrapped), global_batch_size=scene.batch, num_input_channels=3)
    method.to(scene.device, memory_format=setting.layout)
    optimizer = optimizer_helpers.get_optimizer(
        optim_args=optim, trainable_modules=method.trainable_modules(), lr_scale=(scene.batch / 1536) ** 0.5
    )
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batches = normalised(scene, setting)

    def step() -> None:
        images, _ = next(batches)
        with scene.autocast(setting):
            loss = method.training_step_impl({"views": [images]}, 0).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return step


_QUEUE = 256  # its choice for 1,000 to 2,000 images


def _for_lightly(teacher: nn.Module) -> nn.Module:
    """Let a call of a timm network return its embedding, whose size is ``embed_dim``."""

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.embed_dim = teacher, teacher.head_hidden_size

        def forward(self, images: Tensor) -> Tensor:
            return self.teacher.forward_head(self.teacher.forward_features(images), pre_logits=True)

    return Embedding()


def _in_each(label: str, ours: str, peer: Callable[..., Step]) -> dict[str, tuple[str, Callable[[Scene], Step]]]:
    settings = {"plain": PLAIN, "f32": FLOAT32, "bf16": FAST}
    return {f"{label}, {name}": (ours, partial(peer, setting=setting)) for name, setting in settings.items()}


PEERS: Mapping[str, tuple[str, Callable[[Scene], Step]]] = {
    "authors' stage 1": ("stage 1", authors),
    **_in_each("timm KD", "kd", partial(of_timm, "LogitDistillationTask")),
    **_in_each("timm features", "feature_mse", partial(of_timm, "FeatureDistillationTask")),
    **_in_each("torchdistill KD", "kd", of_torchdistill),
    **_in_each("lightly v1", "regression", partial(of_lightly, "v1")),
    **_in_each("lightly v3", "regression", partial(of_lightly, "v3")),
}
"""Each peer's row of ours that does the same work, and its loop."""


def peers_of(row: str, scene: Scene) -> dict[str, tuple[str, Step]]:
    """Return the peers of a row of ours that can be built here, and say which cannot."""
    found: dict[str, tuple[str, Step]] = {}
    for name, (ours, peer) in PEERS.items():
        if ours == row and (scene.of_timm or not name.endswith("f32")):
            try:
                found[name] = (ours, peer(scene))
            except (ImportError, LeftOutError) as error:
                print(f"{name}: left out, {error}")
    return found
