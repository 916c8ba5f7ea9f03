"""What the contestants of ``step.py`` share: networks, images, the clock, and the shortest possible loop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.data import Split, Task, augment, epoch_batches
from refilled.data.store import gathered
from refilled.models import Backbone, create_model, freeze
from refilled.outputs import Outputs
from refilled.training.teacher_cache import Contents, TeacherCache

CLASSES = 100
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}

Step = Callable[[], None]
Batches = Iterator[tuple[Tensor, Tensor]]
Objective = Callable[[Outputs, Outputs | None, Tensor], Tensor]


class Setting(NamedTuple):
    """The number format and the memory layout of a loop."""

    bf16: bool
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


PLAIN = Setting(bf16=False, channels_last=False)
FLOAT32 = Setting(bf16=False, channels_last=True)
FAST = Setting(bf16=True, channels_last=True)


@dataclass(frozen=True)
class Scene:
    """The data and settings that all contestants share."""

    student_name: str
    teacher_name: str
    task: Task
    batch: int
    cache: TeacherCache
    device: torch.device
    fast: bool
    """Whether bfloat16 is the fastest setting of this machine; :data:`FAST` is float32 otherwise."""

    @property
    def of_timm(self) -> bool:
        return self.student_name.startswith("timm/")

    def clock(self) -> float:
        """Seconds, when all that was begun is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def autocast(self, setting: Setting) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast and setting.bf16)

    def student(self, setting: Setting = FAST) -> Backbone:
        return self._model(self.student_name, setting).train()

    def teacher(self, setting: Setting = FAST) -> Backbone:
        return freeze(self._model(self.teacher_name, setting))

    def ready(self) -> Batches:
        """Return the same batch forever, at no cost."""
        labels = self.task.train.labels[: self.batch].to(self.device)
        return repeat((self.task.train.pixels[: self.batch], labels))

    def drawn(self) -> Batches:
        """The batches of a run, augmented."""
        train, kind = self.task.train, self.task.augmentation
        for epoch in count():
            for batch in epoch_batches(train.labels, batch_size=self.batch, seed=0, epoch=epoch):
                yield (
                    augment(gathered(train.pixels, batch), batch, seed=0, view=epoch, kind=kind),
                    train.labels[batch].to(self.device),
                )

    def _model(self, name: str, setting: Setting) -> Backbone:
        model = create_model(name, CLASSES, image_size=self.task.image_size)
        model.class_names = self.task.classes
        return model.to(self.device, memory_format=setting.layout)


def bare(scene: Scene, objective: Objective, batches: Batches, taught: bool = True, setting: Setting = FAST) -> Step:
    """The shortest possible loop."""
    student = scene.student(setting)
    teacher = scene.teacher(setting) if taught else None
    optimizer = torch.optim.SGD(student.parameters(), fused=setting.channels_last, **SGD)

    def step() -> None:
        images, labels = next(batches)
        images = images.contiguous(memory_format=setting.layout)
        with scene.autocast(setting):
            with torch.no_grad():
                heard = None if teacher is None else teacher(images)
            seen = student(images)
        optimizer.zero_grad()
        objective(seen, heard, labels).backward()
        optimizer.step()

    return step


def cross_entropy(seen: Outputs, taught: Outputs | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(seen.logits.float(), labels)


def made_up_task(images: int, size: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    train = Split(pixels.contiguous(memory_format=torch.channels_last), labels, ("",) * images)
    nothing = Split(pixels[:0], labels[:0], ())
    return Task("made up", tuple(map(str, range(CLASSES))), train, nothing, nothing, size, "crop-flip", fingerprint="")


def made_up_cache(folder: Path, task: Task, embedding_dim: int) -> TeacherCache:
    contents = Contents("made up", "made up", len(task.train), embedding_dim, 1, task.augmentation, "32-true")
    cache = TeacherCache(folder, contents)
    cache.build(task, lambda images: torch.rand(len(images), embedding_dim))
    return cache
