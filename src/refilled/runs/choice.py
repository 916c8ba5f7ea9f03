"""The precision of a student's training by measurement, one choice per machine, student and teachers."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from refilled.config import Run
from refilled.files import alone, cache_folder, write_atomic
from refilled.models import Backbone
from refilled.recipe import Precision
from refilled.runs.environment import device_name
from refilled.runs.prepared import Prepared
from refilled.training.distributed import ALONE, World

_BATCH = 32
_TEACHER_PIXELS = 2**18  # of the images that a teacher is timed with
_SECONDS = 1.5
_MARGIN = 0.97  # of bfloat16's time: what float32 must beat, so that noise does not decide


Seconds = dict[Precision, float]


def is_measured(asked: Run, resolved: Run) -> bool:
    """Return whether the precision of a run is measured: ``auto``, a timm student, a CPU that multiplies in bfloat16.

    The project's own networks keep bfloat16 unmeasured. So do runs with ``views``, whose cached embeddings have to
    be in one precision for all students. It costs them little, since depthwise convolutions train in float32 anyway.
    """
    timm = resolved.student is not None and resolved.student.startswith("timm/")
    cpu = resolved.device == "cpu" and resolved.precision == "bf16-mixed"
    return asked.precision == "auto" and timm and cpu and resolved.views is None


def settle_precision(asked: Run, prepared: Prepared, world: World = ALONE) -> None:
    """Settle the precision of a prepared run; rank 0 decides for all processes."""
    if is_measured(asked, prepared.run):
        precision = world.lead(lambda: choose_precision(prepared.student, prepared.task.image_size, prepared.teachers))
        prepared.run = replace(prepared.run, precision=precision)


def choose_precision(student: Backbone, image_size: int, teachers: Sequence[Backbone] = ()) -> Precision:
    """Return the faster precision of a training step with live teachers, as it was first measured on this machine.

    The student is timed first. Only if float32 is faster for it alone are the teachers timed too, since they have the
    same precision and nearly all gain from bfloat16.

    The choice is kept below the cache folder, so that equal runs compute alike.
    """

    def in_all() -> Seconds:
        each = [step_seconds(student, image_size), *(forward_seconds(teacher, image_size) for teacher in teachers)]
        return {precision: sum(seconds[precision] for seconds in each) for precision in each[0]}

    try:
        chosen = _kept([student], image_size, lambda: step_seconds(student, image_size))
        return _kept([student, *teachers], image_size, in_all) if chosen == "32-true" and teachers else chosen
    except OSError:  # there is no place for a record, without which equal runs could differ
        return "bf16-mixed"


def _kept(networks: Sequence[Backbone], image_size: int, measure: Callable[[], Seconds]) -> Precision:
    machine = (device_name(torch.device("cpu")), torch.__version__)
    key = sha256(repr((machine, image_size, *map(str, networks))).encode()).hexdigest()[:16]
    folder = cache_folder() / "precision"
    path = folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):  # one at a time: measurements would disturb each other
        kept = _read(path)
        if kept is None:
            seconds = measure()
            kept = "32-true" if seconds["32-true"] < _MARGIN * seconds["bf16-mixed"] else "bf16-mixed"
            names = [network.architecture for network in networks]
            record = {"precision": kept, "student": names[0], "teachers": names[1:], "seconds": seconds}
            write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
        return kept


def step_seconds(student: Backbone, image_size: int) -> Seconds:
    """Measure forward and backward of a copy of a student in either precision, in turn, for about two seconds.

    Neither the student nor the random numbers change.
    """
    copy = deepcopy(student).to(memory_format=torch.channels_last).train()
    return _fastest(lambda images, precision: _step(copy, images, precision), _BATCH, image_size)


def forward_seconds(teacher: Backbone, image_size: int) -> Seconds:
    """Measure the forward pass of a frozen teacher as :func:`step_seconds` does, for as many images."""
    side = max(image_size, teacher.input_size or 0)
    count = max(1, min(_BATCH, _TEACHER_PIXELS // side**2))

    @torch.no_grad()
    def forward(images: Tensor, precision: Precision) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            teacher(images)

    seconds = _fastest(forward, count, image_size)
    return {precision: _BATCH / count * taken for precision, taken in seconds.items()}


def _fastest(pass_: Callable[[Tensor, Precision], None], count: int, image_size: int) -> Seconds:
    best: Seconds = {"32-true": float("inf"), "bf16-mixed": float("inf")}
    with torch.random.fork_rng(devices=[]):
        shape = (count, image_size, image_size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        for precision in best:
            pass_(images, precision)  # the first pass sets up the kernels
        start = perf_counter()
        while best["bf16-mixed"] == float("inf") or perf_counter() - start < _SECONDS:
            for precision in best:
                before = perf_counter()
                pass_(images, precision)
                best[precision] = min(best[precision], perf_counter() - before)
    return best


def _step(student: Backbone, images: Tensor, precision: Precision) -> None:
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        outputs = student(images)
    (outputs.logits.float().square().mean() + outputs.embedding.float().square().mean()).backward()


def _read(path: Path) -> Precision | None:
    try:
        found: Precision = json.loads(path.read_text(encoding="utf-8"))["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found in ("32-true", "bf16-mixed") else None
