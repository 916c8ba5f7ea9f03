"""The cost of the triplet-alignment loss, compared with a general miner and with the floor that no miner can beat.

Forward and backward, in one thread, on embeddings of 64 numbers (student) and 128 (teacher) with 100 classes::

    python benchmarks/mining.py                          # N = 128 .. 8192, about ten minutes
    python benchmarks/mining.py --sizes 128 256 --runs 9

Columns: ``ours``, the whole loss; ``floor``, the N × N matrix of student distances alone; ``mining``, our miner
alone; ``tuple``, our ``negatives="semihard"``; ``peer``, the loss on the triplets of pytorch-metric-learning's
``TripletMarginMiner(margin=0.2, type_of_triplets="semihard")``, distances taken between gathered rows; ``matrix``, the
same with distances looked up in N × N matrices. ``tuple`` uses all the triplets of that miner.

The contestants take turns. Each time is the median of processor time, since others may use the machine. Memory is the
most that tensors occupied at once beyond the inputs, in N² float32 numbers, for ``ours`` and ``tuple``.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from refilled.losses.distances import pairwise_distances, unit_rows
from refilled.losses.mining import semi_hard_triplets
from refilled.losses.triplet_alignment import TripletAlignmentLoss, triplet_alignment

CLASSES = 100
COLUMNS = ("ours", "floor", "mining", "tuple", "peer", "matrix")
COLUMNS += ("ours/floor", "peer/ours", "matrix/ours", "matrix/tuple", "memory/N²")
LARGEST_MATRIX = 1024  # beyond this, the miner's N³ masks need 30 GB
LARGEST_PEER = 1024**3 * 64  # N³·d beyond which the gathered rows need 16 GB
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def floor(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The N × N distances of unit rows and nothing else."""
    x = F.normalize(student)
    return (2 - 2 * x @ x.T).clamp_min(1e-12).sqrt().sum()


def peer(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Triplet alignment on all semi-hard triplets, listed by a general miner, between gathered rows."""
    anchor, positive, negative = list_triplets(student, labels)
    gaps = []
    for embedding in (student, teacher):
        x = F.normalize(embedding)
        gaps.append(F.pairwise_distance(x[anchor], x[negative]) - F.pairwise_distance(x[anchor], x[positive]))
    return triplet_alignment(gaps[0], gaps[1] / 2).sum()


def matrix(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Do the same with the distances looked up in matrices, which is faster for the peer."""
    anchor, positive, negative = list_triplets(student, labels)
    gaps = []
    for embedding in (student, teacher):
        distance = pairwise_distances(unit_rows(embedding))
        gaps.append(distance[anchor, negative] - distance[anchor, positive])
    return triplet_alignment(gaps[0], gaps[1] / 2).sum()


def list_triplets(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(student, labels)


def mining(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mining alone, without a loss."""
    semi_hard_triplets(student, labels)
    return student.sum()


def seconds(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """One forward and backward pass."""
    student.grad = None
    start = process_time()
    loss(student, teacher, labels).backward()
    return process_time() - start


def peak_memory(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Most bytes allocated at once above the start, counted from the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        seconds(loss, student, teacher, labels)
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 4096, 8192])
    options.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="student; the teacher's is twice that")
    options.add_argument("--runs", type=int, default=7)
    given = options.parse_args()

    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {CLASSES} classes, median of {given.runs} runs, milliseconds")
    print(" ".join(f"{name:>11}" for name in ("N", "d", *COLUMNS)))
    for dim in given.dims:
        for size in given.sizes:
            report(size, dim, given.runs)


def report(size: int, dim: int, runs: int) -> None:
    generator = torch.Generator().manual_seed(size)
    student = torch.randn(size, dim, generator=generator).requires_grad_()
    teacher = torch.randn(size, 2 * dim, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    batch = (student, teacher, labels)

    losses: dict[str, Loss] = {
        "ours": TripletAlignmentLoss(),
        "floor": floor,
        "mining": mining,
        "tuple": TripletAlignmentLoss(negatives="semihard"),
    }
    if size**3 * dim <= LARGEST_PEER:
        losses["peer"] = peer
    if size <= LARGEST_MATRIX:
        losses["matrix"] = matrix
    for loss in losses.values():
        seconds(loss, *batch)
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(runs):
        for name, loss in losses.items():
            seconds(loss, *batch)  # so that caches and heap are this contestant's own
            taken[name].append(1000 * seconds(loss, *batch))
    t = {name: median(times) for name, times in taken.items()}
    memory = {name: peak_memory(losses[name], *batch) / (4 * size**2) for name in ("ours", "tuple")}

    cells = [f"{t[name]:11.2f}" if name in t else f"{'-':>11}" for name in COLUMNS[:6]]
    for other, one in (pair.split("/") for pair in COLUMNS[6:10]):
        cells.append(f"{t[other] / t[one]:11.2f}" if other in t else f"{'-':>11}")
    print(f"{size:11} {dim:11}", *cells, f"{memory['ours']:5.1f} {memory['tuple']:5.1f}", flush=True)


if __name__ == "__main__":
    main()
