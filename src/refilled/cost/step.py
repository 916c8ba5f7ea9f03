"""The cost of a step in time and memory, extrapolated from smaller steps.

The training loop is timed on random images at two batch sizes. Its cost has a fixed part, such as the optimiser, and a
part that is proportional to the number of images. The line through the two sizes gives the cost at any size. Memory is
estimated in the same way. Communication between processes cannot be timed in one process, and is modelled.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Self

import torch
from lightning_fabric import Fabric
from torch import Tensor

from refilled.config import Run
from refilled.data import Split, Task, TaskSize
from refilled.models import Backbone
from refilled.runs.determinism import give_memory_back
from refilled.stages import Stage
from refilled.training.evaluation import SCORING_BATCH, predict
from refilled.training.loop import Journal, Position, fit

_BATCHES_ON_A_CPU = (8, 32)  # images per step; an accelerator is timed with more, because few do not fill it
_STEPS = 3  # timed, after one for warm-up
_HEAD_STEPS = (5, 25)  # of the heads, each of which takes much less time than the start of a training
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Line:
    """A cost of ``fixed`` plus ``each`` per image."""

    fixed: float
    each: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Self:
        """Return the line through two measurements, (images, cost).

        Neither part is below 0, even with noise. Two equal sizes give a proportional cost.
        """
        (fewer, less), (images, cost) = small, large
        slope = (cost - less) / (images - fewer) if images > fewer else math.inf
        each = min(max(slope, 0.0), cost / images)
        return cls(max(cost - each * images, 0.0), each)

    def __call__(self, images: int) -> float:
        """Return the cost of this many images."""
        return self.fixed + self.each * images


@dataclass(frozen=True)
class Cost:
    """The cost of a piece of work, as a function of the number of images processed at once."""

    seconds: Line
    memory: Line | None
    """Peak bytes of the accelerator, or of the process on a CPU; None if they cannot be measured."""


@dataclass(frozen=True)
class Network:
    """The network between processes. The default, a 100 Gbit/s link, is an assumption, not a measurement."""

    bandwidth: float = 10e9
    """Bytes per second, in each direction."""
    latency: float = 20e-6
    """Seconds per message."""

    def all_gather(self, size: float, ranks: int) -> float:
        """Return the seconds until every rank has all of ``size`` bytes, of which each had a part.

        Large messages travel around a ring, small ones along a tree.
        """
        return (ranks - 1) * size / ranks / self.bandwidth + math.ceil(math.log2(ranks)) * self.latency

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the seconds until every rank has the sum of all ranks' ``size`` bytes."""
        return 2 * self.all_gather(size, ranks)


@dataclass(frozen=True)
class Probe:
    """A stage that trains on random images, to be measured. The student's weights change.

    Attributes:
        student: The student.
        teacher: The frozen teacher, or several; None if the stage needs none.
        stage: The stage.
        size: The task's classes and image size.
        run: The run, resolved.
        fabric: The device and precision.
    """

    student: Backbone
    teacher: Backbone | Sequence[Backbone] | None
    stage: Stage
    size: TaskSize
    run: Run
    fabric: Fabric

    def step_cost(self, batches: tuple[int, int]) -> Cost:
        """Measure a step at two batch sizes, in images; see :func:`probe_batches`."""

        def take_steps(images: int) -> float:
            _, ticks = self._train(images, steps=1 + _STEPS)
            return median(after - before for before, after in pairwise(ticks))

        return _cost_of(take_steps, batches, self.fabric.device)

    def head_step_seconds(self, images: int) -> float:
        """Measure a step of the heads (``head_steps``) with this many images, in seconds."""

        def until_the_first_step(head_steps: int) -> float:
            start, ticks = self._train(images, head_steps=head_steps)
            return ticks[0] - start

        fewer, more = _HEAD_STEPS
        until_the_first_step(fewer)  # warms up
        return max(0.0, until_the_first_step(more) - until_the_first_step(fewer)) / (more - fewer)

    def _train(self, images: int, steps: int = 1, head_steps: int = 0) -> tuple[float, list[float]]:
        """Take steps of this many images, and return the time before training and after each step."""
        # The learning rate is tiny, because the loss could diverge on random images.
        recipe = replace(
            self.run,
            epochs=1,
            least_steps=0,
            batch_size=images,
            lr=1e-9,
            head_steps=head_steps,
            warmup=0.0,
            sampler="shuffle",
            views=None,
        )
        clock, task = _Clock(), made_up_task(self.size, images * steps).near(self.fabric.device)
        stages, start = [replace(self.stage, share=1.0)], perf_counter()
        fit(self.student, self.teacher, task, stages, recipe, self.fabric, clock, cuda_graphs=self.run.cuda_graphs)
        return start, clock.ticks


def probe_batches(device: str, most: int) -> tuple[int, int]:
    """Return the two batch sizes to measure, both above 1 image, which batch norm may refuse."""
    small, large = _BATCHES_ON_A_CPU if device == "cpu" else (math.ceil(most / 2), most)
    return min(small, max(2, most // 2), most), min(large, most)


def scoring_cost(network: Backbone, size: TaskSize, run: Run, fabric: Fabric, fully: bool = False) -> Cost:
    """Measure a forward pass as in scoring, without gradients or augmentation.

    It computes in the run's precision, or in float32 as for the result if ``fully``.
    """
    network.to(fabric.device)

    def score(images: int) -> float:
        pixels, taken = made_up_task(size, images).train.pixels, []
        for _ in range(1 + _STEPS):
            start = perf_counter()
            with nullcontext() if fully else fabric.autocast():
                predict(network, pixels, fabric.device)  # copies outputs to the CPU, so the device has finished
            taken.append(perf_counter() - start)
        return median(taken[1:])

    return _cost_of(score, probe_batches(run.device, SCORING_BATCH), fabric.device)


def made_up_task(size: TaskSize, images: int) -> Task:
    """Return a task of noise with the given classes and image size, and this many training images."""
    shape = (images, size.image_size, size.image_size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.arange(images) % len(size.class_names)
    train, one = (Split(pixels[:n], labels[:n], ("",) * n) for n in (images, 1))
    nothing = Split(pixels[:0], labels[:0], ())
    val, test = (one if count else nothing for count in (size.val, size.test))
    return Task("made up", size.class_names, train, val, test, size.image_size, size.augmentation, fingerprint="")


def _cost_of(work: Callable[[int], float], sizes: tuple[int, int], device: torch.device) -> Cost:
    points = []
    for size in sizes:
        _forget_peak(device)
        points.append((work(size), _peak(device)))
    (less, low), (more, high) = points
    seconds = Line.through((sizes[0], less), (sizes[1], more))
    memory = None if low is None or high is None else Line.through((sizes[0], low), (sizes[1], high))
    return Cost(seconds, memory)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        give_memory_back()  # otherwise memory kept from earlier steps would count
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets only the peak


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():  # without a reset, the peak may be older
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return None if peak is None else 1024.0 * int(peak[1])


class _Clock(Journal):
    """A journal that records only the time after each step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        for value in values.values():
            value.item()  # waits until the accelerator has finished the step
        self.ticks.append(perf_counter())
