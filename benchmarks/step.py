"""The cost of a training step: every method compared with its bare arithmetic and with its peers.

One process, one thread of a processor, made-up images of 100 classes; 32 pixels and teacher WRN-40-2 by default::

    python benchmarks/step.py                                  # students WRN-16-2 and WRN-16-1, about four minutes
    python benchmarks/step.py --students wrn_16_1 --rounds 15
    python benchmarks/step.py --image-size 96 --batch 32 --students timm/mobilenetv3_small_050 --teacher timm/resnet50
    python benchmarks/step.py --device cuda --rounds 50        # on an NVIDIA GPU

Our rows are the product's own training loop, ``refilled.training.loop.fit``, held after every step until its next turn.
All contestants take one step in turn, round after round; each number is a median over the rounds, and each ratio the
median of the ratios within a round. Times are processor time, since others may use the machine; on a GPU they are
by the clock, from an idle GPU to an idle GPU.

``student, arithmetic`` and ``both, arithmetic`` are shortest loops on one ready batch: forward,
cross-entropy, backward and a fused optimiser, and the teacher's forward pass before it. Nothing can train faster with
these networks in this precision. ``plain`` loops are the same in float32 and PyTorch's own memory layout, ``float32``
and ``f32`` those in float32 and channels-last memory.

Peers get our images: the same augmented views of the same batches. ``authors`` is stage 1 as in the authors'
repository: pytorch-metric-learning's miner, temperature 4 on both sides, float32. timm, torchdistill and lightly-train
come as they are and in bfloat16 with channels-last memory, as timm's training script offers. With a student of timm
they also come in float32 with that memory, which suits depthwise convolutions. One that is not installed is left out.
``peers.py`` has their loops.
"""

import argparse
import ctypes
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from threading import Semaphore, Thread
from typing import Any

import torch
from lightning_fabric import Fabric
from peers import PEERS, peers_of
from scene import CLASSES, FLOAT32, PLAIN, SGD, Scene, Step, bare, cross_entropy, made_up_cache, made_up_task
from torch import Tensor, nn

from refilled.losses.triplet_alignment import TripletAlignmentLoss
from refilled.methods import list_methods, load_method
from refilled.models import Backbone, create_model
from refilled.outputs import Outputs
from refilled.recipe import Recipe
from refilled.runs.determinism import use_machine
from refilled.runs.environment import device_name, find_device
from refilled.stages import Stage, Term, constant
from refilled.training.loop import Journal, Position, fit
from refilled.training.precision import resolve_precision

STAGE_1, STAGE_2 = {"embedding_share": 1.0}, {"embedding_share": 0.0}
CACHED = ["kd", "feature_mse", "regression"]
"""Methods whose row with the cache is shown for students of timm, whose peers have none."""


class Ours(Journal):
    """The product's training loop, in a thread that waits after every step: also the loop's journal."""

    def __init__(
        self,
        scene: Scene,
        stages: Callable[[Backbone, Backbone], Sequence[Stage]],
        cached: bool = False,
        precision: str = "auto",
        graphs: bool = True,
    ) -> None:
        self._turn, self._taken = Semaphore(0), Semaphore(0)
        self._error: Exception | None = None
        Thread(target=self._train, args=(scene, stages, cached, precision, graphs), daemon=True).start()

    def __call__(self) -> None:
        """Take one step."""
        self._turn.release()
        self._taken.acquire()
        if self._error is not None:
            raise self._error

    def _train(
        self, scene: Scene, stages: Callable[..., Sequence[Stage]], cached: bool, precision: str, graphs: bool
    ) -> None:
        self._turn.acquire()
        try:
            student, teacher = scene.student(), scene.teacher()
            setting, views = resolve_precision(precision, scene.device), 1 if cached else None
            recipe = Recipe(batch_size=scene.batch, epochs=10**6, views=views, warmup=0, precision=setting, **SGD)
            fabric = Fabric(accelerator=scene.device.type, devices=1, precision=setting)
            cache, plan = scene.cache if cached else None, stages(student, teacher)
            fit(student, teacher, scene.task, plan, recipe, fabric, self, cache, cuda_graphs=graphs)
        except Exception as error:
            self._error = error
            self._taken.release()

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        self._taken.release()
        self._turn.acquire()


def method(name: str, settings: Mapping[str, Any], student: Backbone, teacher: Backbone) -> Sequence[Stage]:
    return load_method(name).build(student, teacher, settings)


class Listen(nn.Module):
    """A loss that reads the teacher's output and is always 0."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return student.new_zeros(())


def listening(student: Backbone, teacher: Backbone) -> Sequence[Stage]:
    """Cross-entropy with a live teacher that nothing is learned from."""
    listen = Term(Listen(), constant(0.0), student="embedding", teacher="embedding")
    return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss()), "listen": listen})]


def our_stage_1(seen: Outputs, taught: Outputs, labels: Tensor) -> Tensor:
    """The losses of this package in a plain loop."""
    return TripletAlignmentLoss()(seen.embedding, taught.embedding, labels)


def baselines() -> list[str]:
    """All other methods that train a student of a teacher."""
    found = {name: load_method(name) for name in list_methods()}
    return [n for n, method in found.items() if method.takes_student and method.takes_teacher and n != "refilled"]


def contestants(scene: Scene, methods: Sequence[str], live: bool = True) -> dict[str, tuple[str, Step]]:
    """Return every row of the table: its baseline and its step. Rows to compare are adjacent."""
    alone, together = "student, arithmetic", "both, arithmetic"
    stage_1, stage_2 = partial(method, "refilled", STAGE_1), partial(method, "refilled", STAGE_2)
    plain = bare(scene, cross_entropy, scene.drawn(), taught=False, setting=PLAIN)
    rows: dict[str, tuple[str, Step]] = {
        alone: (alone, bare(scene, cross_entropy, scene.ready(), taught=False)),
        "student alone": (alone, Ours(scene, partial(method, "vanilla", {}))),
        "stage 1, cache": ("student alone", Ours(scene, stage_1, cached=True)),
        "stage 2, cache": ("student alone", Ours(scene, stage_2, cached=True)),
        "rkd, cache": ("student alone", Ours(scene, partial(method, "rkd", {}), cached=True)),
    }
    if scene.of_timm:
        for name in filter(methods.__contains__, CACHED):
            rows[f"{name}, cache"] = "student alone", Ours(scene, partial(method, name, {}), cached=True)
        float32 = bare(scene, cross_entropy, scene.ready(), taught=False, setting=FLOAT32)
        rows["student, float32"] = alone, float32
    rows["student, plain"] = "student alone", plain
    if not live:
        return rows
    rows |= {
        together: (together, bare(scene, cross_entropy, scene.ready())),
        "+ live teacher": (together, Ours(scene, listening)),
        "stage 1": (together, Ours(scene, stage_1)),
        "stage 2": (together, Ours(scene, stage_2)),
        "stage 1, float32": ("stage 1", Ours(scene, stage_1, precision="32-true")),
        "stage 1, plain": ("stage 1", bare(scene, our_stage_1, scene.drawn(), setting=PLAIN)),
        **peers_of("stage 1", scene),
    }
    if scene.device.type == "cuda":
        rows["student alone, no graphs"] = "student alone", Ours(scene, partial(method, "vanilla", {}), graphs=False)
        rows["stage 1, no graphs"] = "stage 1", Ours(scene, stage_1, graphs=False)
    for name in methods:
        rows |= {name: (together, Ours(scene, partial(method, name, {}))), **peers_of(name, scene)}
    return rows


def bars(times: Mapping[str, Sequence[float]], of_timm: bool) -> list[tuple[str, float, str, bool]]:
    """Return the targets: description, ratio, bound, and whether it holds."""
    found = []

    def at_most(row: str, other: str, bound: float, name: str = "") -> None:
        ratio = relative(times, row, other)
        found.append((f"{row} / {name or other}", ratio, f"<= {bound:.2f}", ratio <= bound))

    for row in ("stage 1", "stage 2") if "stage 1" in times else ():
        at_most(row, "both, arithmetic", 1.05, "(teacher forward + student step)")
    for row in filter(lambda row: row.endswith(", cache"), times):
        if of_timm:
            at_most(row, "student, arithmetic", 1.03)
        elif row.startswith("stage"):
            at_most(row, "student alone", 1.10)
    for row in ("stage 1", "stage 1, cache"):
        if "authors' stage 1" in times:
            ratio = relative(times, "authors' stage 1", row)
            found.append((f"authors' stage 1 / {row}", ratio, ">= 3", ratio >= 3))
    for peer, (ours, _) in PEERS.items():
        if peer in times and ours != "stage 1":
            ratio = relative(times, peer, ours)
            found.append((f"{peer} / {ours}", ratio, ">= 1", ratio >= 1))
    return found


def relative(times: Mapping[str, Sequence[float]], row: str, other: str) -> float:
    return median(a / b for a, b in zip(times[row], times[other], strict=True))


def one_heap() -> None:
    """Let our threads take memory from the heap of the peers, as a run without threads does.

    The heaps that glibc makes for threads are in pieces of 64 MB, which go back to the system when they are empty.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX of malloc.h


def measure(scene: Scene, rounds: int, methods: Sequence[str], live: bool) -> None:
    torch.manual_seed(0)
    rows = contestants(scene, methods, live)
    for _, step in rows.values():
        for _ in range(1 if scene.device.type == "cpu" else 3):
            step()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (_, step) in rows.items():
            start = scene.clock()
            step()
            times[name].append(scene.clock() - start)
    size = scene.task.image_size
    print(f"\n{scene.student_name} taught by {scene.teacher_name}, {size} px, batch {scene.batch}, {rounds} rounds")
    print(f"{'':24} {'ms':>8} {'images/s':>9} {'ratio':>7}  of its time to that of")
    for name, (against, _) in rows.items():
        taken = median(times[name])
        ratio = "" if against == name else f"{relative(times, name, against):7.2f}  {against}"
        print(f"{name:24} {1000 * taken:8.1f} {scene.batch / taken:9.0f} {ratio}")
    print()
    for words, ratio, bound, held in bars(times, scene.of_timm):
        print(f"{words:48} {ratio:6.2f} {bound:>8}  {'held' if held else 'MISSED'}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--students", nargs="+", help="default: wrn_16_2 wrn_16_1")
    options.add_argument("--teacher", help="default: wrn_40_2")
    options.add_argument("--image-size", type=int, default=32)
    options.add_argument("--batch-size", "--batch", dest="batch", type=int, default=128)
    options.add_argument("--methods", nargs="+", default=baselines(), help="baselines to show; all by default")
    options.add_argument("--no-live", action="store_true", help="only the rows without a live teacher")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--quick", action="store_true", help="small networks and one round: does it still run?")
    given = options.parse_args()
    if given.quick:
        given.batch, given.rounds = 8, 1
    given.students = given.students or (["wrn_10_1"] if given.quick else ["wrn_16_2", "wrn_16_1"])
    given.teacher = given.teacher or ("wrn_10_1" if given.quick else "wrn_40_2")

    use_machine(threads=1)
    one_heap()
    logging.disable(logging.WARNING)  # timm and torchdistill log what they build
    device = find_device(given.device)
    task = made_up_task(8 * given.batch, given.image_size)
    fast = resolve_precision("auto", device) == "bf16-mixed"
    where = "1 thread" if device.type == "cpu" else device_name(device)
    print(f"torch {torch.__version__}, {where}, {'bfloat16' if fast else 'float32'} where not said otherwise")
    with tempfile.TemporaryDirectory() as folder:
        for student in given.students:
            width = create_model(given.teacher, CLASSES, image_size=given.image_size).embedding_dim
            cache = made_up_cache(Path(folder), task, width)
            scene = Scene(student, given.teacher, task.near(device), given.batch, cache, device, fast)
            measure(scene, given.rounds, given.methods, not given.no_live)


if __name__ == "__main__":
    main()
