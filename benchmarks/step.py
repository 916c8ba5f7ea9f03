"""The cost of a training step: every method compared with its bare arithmetic and with its peers.

One process, one thread of a processor, made-up images of 32 pixels and 100 classes, teacher WRN-40-2::

    python benchmarks/step.py                                  # students WRN-16-2 and WRN-16-1, about four minutes
    python benchmarks/step.py --students wrn_16_1 --rounds 15
    python benchmarks/step.py --device cuda --rounds 50        # on an NVIDIA GPU

Our rows are the product's own training loop, ``refilled.training.loop.fit``, held after every step until its next turn.
All contestants take one step in turn, round after round; each number is a median over the rounds, and each ratio the
median of the ratios within a round. Times are processor time, since others may use the machine; on a GPU they are
by the clock, from an idle GPU to an idle GPU.

``student, arithmetic`` and ``both, arithmetic`` are shortest loops on one ready batch: forward,
cross-entropy, backward and a fused optimiser, and the teacher's forward pass before it. Nothing can train faster with
these networks in this precision. ``plain`` loops are the same in float32 and PyTorch's own memory layout.

Peers get our images: the same augmented views of the same batches. ``authors`` is stage 1 as in the authors'
repository: pytorch-metric-learning's miner, temperature 4 on both sides, float32. timm and torchdistill come
twice, as they are and in bfloat16 with channels-last memory, as timm's training script offers. One that is not
installed is left out.
"""

import argparse
import ctypes
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from pathlib import Path
from statistics import median
from threading import Semaphore, Thread
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from refilled.data import Split, Task, augment, epoch_batches
from refilled.losses.triplet_alignment import TripletAlignmentLoss
from refilled.methods import list_methods, load_method
from refilled.models import Backbone, create_model, freeze
from refilled.outputs import Outputs
from refilled.recipe import Recipe
from refilled.runs.determinism import use_machine
from refilled.runs.environment import device_name, find_device
from refilled.stages import Stage, Term, constant
from refilled.training.loop import Journal, Position, fit
from refilled.training.precision import resolve_precision
from refilled.training.teacher_cache import Contents, TeacherCache

CLASSES = 100
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
STAGE_1, STAGE_2 = {"embedding_share": 1.0}, {"embedding_share": 0.0}

Step = Callable[[], None]
Objective = Callable[[Outputs, Outputs | None, Tensor], Tensor]


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
    """Whether bfloat16 is the fastest setting of this machine."""

    def clock(self) -> float:
        """Seconds, when all that was begun is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def autocast(self, plain: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast and not plain)

    def student(self, channels_last: bool = True) -> Backbone:
        return self._model(self.student_name, channels_last).train()

    def teacher(self, channels_last: bool = True) -> Backbone:
        return freeze(self._model(self.teacher_name, channels_last))

    def ready(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the same batch forever, at no cost."""
        labels = self.task.train.labels[: self.batch].to(self.device)
        return repeat((self.task.train.pixels[: self.batch], labels))

    def drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a run, augmented."""
        train, kind = self.task.train, self.task.augmentation
        for epoch in count():
            for batch in epoch_batches(train.labels, batch_size=self.batch, seed=0, epoch=epoch):
                pixels = train.pixels.index_select(0, batch.to(self.device))
                yield augment(pixels, batch, seed=0, view=epoch, kind=kind), train.labels[batch].to(self.device)

    def _model(self, name: str, channels_last: bool) -> Backbone:
        model = create_model(name, CLASSES, image_size=self.task.image_size)
        model.class_names = self.task.classes
        return model.to(self.device, memory_format=_layout(channels_last))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


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


def bare(
    scene: Scene,
    objective: Objective,
    batches: Iterator[tuple[Tensor, Tensor]],
    taught: bool = True,
    plain: bool = False,
) -> Step:
    """The shortest possible loop."""
    student = scene.student(not plain)
    teacher = scene.teacher(not plain) if taught else None
    optimizer = torch.optim.SGD(student.parameters(), fused=not plain, **SGD)

    def step() -> None:
        images, labels = next(batches)
        images = images.contiguous(memory_format=_layout(not plain))
        with scene.autocast(plain):
            with torch.no_grad():
                heard = None if teacher is None else teacher(images)
            seen = student(images)
        optimizer.zero_grad()
        objective(seen, heard, labels).backward()
        optimizer.step()

    return step


def cross_entropy(seen: Outputs, taught: Outputs | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(seen.logits.float(), labels)


def our_stage_1(seen: Outputs, taught: Outputs, labels: Tensor) -> Tensor:
    """The losses of this package in a plain loop."""
    return TripletAlignmentLoss()(seen.embedding, taught.embedding, labels)


def authors(scene: Scene) -> Step:
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

    return bare(scene, objective, scene.drawn(), plain=True)


class ForTimm(nn.Module):
    """Our network with the names that timm's tasks ask for."""

    pretrained_cfg: Mapping[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    in_chans = 3

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network, self.num_classes, self.num_features = network, network.num_classes, network.embedding_dim

    def forward_features(self, images: Tensor) -> Tensor:
        return self.network.embed(self.network.normalize(images))[0]

    def forward_head(self, embedding: Tensor, pre_logits: bool = False) -> Tensor:
        return embedding if pre_logits else self.network.classifier(embedding)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def of_timm(name: str, scene: Scene, plain: bool) -> Step:
    from timm.task import distillation

    student, teacher = ForTimm(scene.student(not plain)), ForTimm(scene.teacher(not plain))
    batches = scene.drawn()
    task = getattr(distillation, name)(student, teacher, nn.CrossEntropyLoss(), verbose=False).to(scene.device).train()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], **SGD)

    def step() -> None:
        images, labels = next(batches)
        images = images.contiguous(memory_format=_layout(not plain))
        with scene.autocast(plain):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_torchdistill(scene: Scene, plain: bool) -> Step:
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
    student, teacher = ForTimm(scene.student(not plain)), ForTimm(scene.teacher(not plain)).eval()
    box = get_distillation_box(teacher, student, {}, config, scene.device, None, False, 1.0)
    batches = scene.drawn()

    def step() -> None:
        images, labels = next(batches)
        images = images.contiguous(memory_format=_layout(not plain))
        with scene.autocast(plain):
            loss = box.forward_process(images, labels)
        box.post_forward_process(loss)

    return step


_TORCHDISTILL = {"path": ".", "io": "output"}

PEERS: Mapping[str, tuple[str, Callable[[Scene], Step]]] = {
    "authors' stage 1": ("stage 1", authors),
    "timm KD, plain": ("kd", partial(of_timm, "LogitDistillationTask", plain=True)),
    "timm KD, bf16": ("kd", partial(of_timm, "LogitDistillationTask", plain=False)),
    "timm features, plain": ("regression", partial(of_timm, "FeatureDistillationTask", plain=True)),
    "timm features, bf16": ("regression", partial(of_timm, "FeatureDistillationTask", plain=False)),
    "torchdistill KD, plain": ("kd", partial(of_torchdistill, plain=True)),
    "torchdistill KD, bf16": ("kd", partial(of_torchdistill, plain=False)),
}
"""Each peer's row of ours that does the same work, and its loop."""


def baselines() -> list[str]:
    """All other methods that train a student of a teacher."""
    found = {name: load_method(name) for name in list_methods()}
    return [n for n, method in found.items() if method.takes_student and method.takes_teacher and n != "refilled"]


def contestants(scene: Scene) -> dict[str, tuple[str, Step]]:
    """Return every row of the table: its baseline and its step. Rows to compare are adjacent."""
    alone, together = "student, arithmetic", "both, arithmetic"
    rows: dict[str, tuple[str, Step]] = {
        alone: (alone, bare(scene, cross_entropy, scene.ready(), taught=False)),
        "student alone": (alone, Ours(scene, partial(method, "vanilla", {}))),
        "stage 1, cache": ("student alone", Ours(scene, partial(method, "refilled", STAGE_1), cached=True)),
        "stage 2, cache": ("student alone", Ours(scene, partial(method, "refilled", STAGE_2), cached=True)),
        "rkd, cache": ("student alone", Ours(scene, partial(method, "rkd", {}), cached=True)),
        "student, plain": ("student alone", bare(scene, cross_entropy, scene.drawn(), taught=False, plain=True)),
        together: (together, bare(scene, cross_entropy, scene.ready())),
        "+ live teacher": (together, Ours(scene, listening)),
        "stage 1": (together, Ours(scene, partial(method, "refilled", STAGE_1))),
        "stage 2": (together, Ours(scene, partial(method, "refilled", STAGE_2))),
        "stage 1, float32": ("stage 1", Ours(scene, partial(method, "refilled", STAGE_1), precision="32-true")),
        "stage 1, plain": ("stage 1", bare(scene, our_stage_1, scene.drawn(), plain=True)),
        **peers_of("stage 1", scene),
    }
    if scene.device.type == "cuda":
        rows["student alone, no graphs"] = "student alone", Ours(scene, partial(method, "vanilla", {}), graphs=False)
        rows["stage 1, no graphs"] = "stage 1", Ours(scene, partial(method, "refilled", STAGE_1), graphs=False)
    for name in baselines():
        rows |= {name: (together, Ours(scene, partial(method, name, {}))), **peers_of(name, scene)}
    return rows


def peers_of(row: str, scene: Scene) -> dict[str, tuple[str, Step]]:
    found: dict[str, tuple[str, Step]] = {}
    for name, (ours, peer) in PEERS.items():
        if ours == row:
            try:
                found[name] = (ours, peer(scene))
            except ImportError as error:
                print(f"{name}: left out, {error}")
    return found


def bars(times: Mapping[str, Sequence[float]]) -> list[tuple[str, float, str, bool]]:
    """Return the targets: description, ratio, bound, and whether it holds."""
    found = []
    for row in ("stage 1", "stage 2"):
        ratio = relative(times, row, "both, arithmetic")
        found.append((f"{row} / (teacher forward + student step)", ratio, "<= 1.05", ratio <= 1.05))
    for row in ("stage 1, cache", "stage 2, cache"):
        ratio = relative(times, row, "student alone")
        found.append((f"{row} / student alone", ratio, "<= 1.10", ratio <= 1.10))
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


def measure(scene: Scene, rounds: int) -> None:
    torch.manual_seed(0)
    rows = contestants(scene)
    for _, step in rows.values():
        for _ in range(1 if scene.device.type == "cpu" else 3):
            step()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (_, step) in rows.items():
            start = scene.clock()
            step()
            times[name].append(scene.clock() - start)
    print(f"\n{scene.student_name} taught by {scene.teacher_name}, batch {scene.batch}, {rounds} rounds")
    print(f"{'':24} {'ms':>8} {'images/s':>9} {'ratio':>7}  of its time to that of")
    for name, (against, _) in rows.items():
        taken = median(times[name])
        ratio = "" if against == name else f"{relative(times, name, against):7.2f}  {against}"
        print(f"{name:24} {1000 * taken:8.1f} {scene.batch / taken:9.0f} {ratio}")
    print()
    for words, ratio, bound, held in bars(times):
        print(f"{words:48} {ratio:6.2f} {bound:>8}  {'held' if held else 'MISSED'}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--students", nargs="+", default=["wrn_16_2", "wrn_16_1"])
    options.add_argument("--teacher", default="wrn_40_2")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--quick", action="store_true", help="small networks and one round: does it still run?")
    given = options.parse_args()
    if given.quick:
        given.students, given.teacher, given.batch, given.rounds = ["wrn_10_1"], "wrn_10_1", 8, 1

    use_machine(threads=1)
    one_heap()
    logging.disable(logging.WARNING)  # timm and torchdistill log what they build
    device = find_device(given.device)
    task = made_up_task(8 * given.batch, 32)
    fast = resolve_precision("auto", device) == "bf16-mixed"
    where = "1 thread" if device.type == "cpu" else device_name(device)
    print(f"torch {torch.__version__}, {where}, {'bfloat16' if fast else 'float32'} where not said otherwise")
    with tempfile.TemporaryDirectory() as folder:
        for student in given.students:
            width = create_model(given.teacher, CLASSES, image_size=32).embedding_dim
            cache = made_up_cache(Path(folder), task, width)
            scene = Scene(student, given.teacher, task.near(device), given.batch, cache, device, fast)
            measure(scene, given.rounds)


if __name__ == "__main__":
    main()
