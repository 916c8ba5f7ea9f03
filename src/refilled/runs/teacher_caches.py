"""The teacher's caches of runs: found, built, compared with the live teacher."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from refilled.config import Run
from refilled.data import Task
from refilled.errors import RunError
from refilled.files import cache_folder
from refilled.models import Backbone
from refilled.runs.determinism import use_machine
from refilled.runs.prepared import Prepared, examine, load_task_of, load_teacher_of, resolve
from refilled.training.distributed import ALONE, World
from refilled.training.loop import views_of
from refilled.training.progress import Display
from refilled.training.teacher_cache import TeacherCache, teacher_cache


def cache_for(prepared: Prepared, number: int, fabric: Fabric, display: Display) -> TeacherCache | None:
    """Build the cache of one of a run's teachers, if the run uses one."""
    teacher, task = prepared.teachers[number], prepared.task
    run = replace(prepared.run, teacher=prepared.run.teachers[number])
    if run.views is None or not any(stage.taught_by(number).embedding_suffices for stage in prepared.stages):
        return None
    cache = _cache_of(run, teacher, task)
    of = f"{run.teacher}: " if len(prepared.teachers) > 1 else ""
    cache.build(task, embedder(teacher, fabric), say=lambda text: display.message(f"{of}{text}"))
    return cache


def gap_of(prepared: Prepared, number: int, cache: TeacherCache, fabric: Fabric) -> dict[str, Any]:
    """Return how far the cache of one of a run's teachers is from the live teacher."""
    gap = cache.gap(prepared.task, embedder(prepared.teachers[number], fabric))
    return {"views": cache.contents.views, **asdict(gap)}


def embedder(teacher: Backbone, fabric: Fabric) -> Callable[[Tensor], Tensor]:
    """Return a function that embeds images by the teacher, as the training loop does."""
    teacher.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), fabric.autocast():
            embedding: Tensor = teacher(images.to(fabric.device)).embedding
        return embedding

    return embed


def build_cache(
    run: Run, shards: Iterable[int] | None = None, say: Callable[[str], None] = lambda text: None
) -> TeacherCache:
    """Embed the views that a run will ask its teacher for, or the part of them in some shards, before the run.

    Only what decides the embeddings counts of the run: task, teacher, views, augmentation, precision, image size. All
    that goes in can be sent to another process; any number of them, given the same run, share the work.

    Args:
        run: The run.
        shards: Numbers of shards, below ``find_cache(run).contents.shards``; None for all.
        say: Told of every shard that is made.

    Raises:
        RefilledError: the run has no teacher or no number of views, or names something that cannot be found.
    """
    run, teacher, task = _cacheable(run)
    for note in examine(teacher, task.train, run.only_teacher):
        say(f"note: {note}")
    cache = _cache_of(run, teacher, task)
    cache.build(task, embedder(teacher, fabric_of(run)), shards, say)
    return cache


def find_cache(run: Run) -> TeacherCache:
    """Find the cache that a run would use, whether or not anything of it is built yet.

    Raises:
        RefilledError: as :func:`build_cache`.
    """
    return _cache_of(*_cacheable(run))


def list_caches() -> list[Path]:
    """Return the folders of all teacher caches of this machine."""
    return sorted(path.parent for path in (cache_folder() / "teacher").glob("*/manifest.json"))


def _cacheable(run: Run) -> tuple[Run, Backbone, Task]:
    if run.views is None:
        raise RunError("a cache holds a fixed number of views of each image; say how many with --views")
    run = resolve(run)
    use_machine(run.threads, run.device)
    if run.teacher is None:
        raise RunError("a cache holds what a teacher says; name one with --teacher")
    task = load_task_of(run)
    return run, load_teacher_of(run, task.image_size), task


def _cache_of(run: Run, teacher: Backbone, task: Task) -> TeacherCache:
    assert run.views is not None  # whoever asks has checked it
    return teacher_cache(
        cache_folder() / "teacher",
        teacher,
        task,
        number=run.views,
        views=views_of(run, task),
        precision=run.precision,
        names=(run.only_teacher or "", task.name),
    )


def fabric_of(run: Run, world: World = ALONE) -> Fabric:
    """Return what runs the computations of a run on its device, in its precision."""
    devices = [world.local_rank] if run.device == "cuda" else 1
    return Fabric(accelerator=run.device, devices=devices, precision=run.precision)  # type: ignore[arg-type]
