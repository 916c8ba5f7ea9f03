"""What the triplet-alignment loss costs: beside a general miner, and beside the floor that no miner can go below.

Forward and backward, in one thread, on embeddings of 64 numbers (student) and 128 (teacher) with 100 classes::

    python benchmarks/mining.py                          # N = 128 .. 8192, about ten minutes
    python benchmarks/mining.py --sizes 128 256 --runs 9

Columns: ``ours``, the whole loss; ``floor``, the N × N matrix of student distances alone; ``peer``, the same loss on
the triplets of pytorch-metric-learning's ``TripletMarginMiner(margin=0.2, type_of_triplets="semihard")``; ``tuple``,
our ``negatives="semihard"``, which uses all the triplets of that miner. The contestants take turns, and each time is a
median. Memory is the most that tensors occupied at once beyond the inputs, in N² float32 numbers.
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

from refilled.distances import pairwise_distances, unit_rows
from refilled.methods.refilled import TripletAlignmentLoss, triplet_alignment
from refilled.mining import semi_hard_triplets

CLASSES = 100
PEER_LIMIT = 1024  # its N³ masks need 30 GB at 2048
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def floor(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The N × N distances of unit rows and nothing else."""
    x = F.normalize(student)
    return (2 - 2 * x @ x.T).clamp_min(1e-12).sqrt().sum()


def peer(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Triplet alignment on all semi-hard triplets, listed by a general miner."""
    anchor, positive, negative = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(student, labels)
    gaps = []
    for embedding in (student, teacher):
        distance = pairwise_distances(unit_rows(embedding))
        gaps.append(distance[anchor, negative] - distance[anchor, positive])
    return triplet_alignment(gaps[0], gaps[1] / 2).sum()


def mining(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mining alone, without a loss."""
    semi_hard_triplets(student, labels)
    return student.sum()


def distances(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The library's own careful distance matrix, in the place of the floor's hasty one."""
    return pairwise_distances(unit_rows(student)).sum()


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
    print("    N    d     ours    floor  mining    tuple      peer | ours/floor  peer/ours  peer/tuple | memory/N²")
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
    if size <= PEER_LIMIT:
        losses["peer"] = peer
    for loss in losses.values():
        seconds(loss, *batch)
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(runs):
        for name, loss in losses.items():
            seconds(loss, *batch)  # what the one before left in caches and heap is not this one's affair
            taken[name].append(1000 * seconds(loss, *batch))
    t = {name: median(times) for name, times in taken.items()}
    memory = {name: peak_memory(losses[name], *batch) / (4 * size**2) for name in ("ours", "tuple")}

    line = f"{size:5} {dim:4} {t['ours']:8.2f} {t['floor']:8.2f} {t['mining']:7.2f} {t['tuple']:8.2f} "
    line += f"{t['peer']:9.1f}" if "peer" in t else f"{'-':>9}"
    line += f" | {t['ours'] / t['floor']:10.2f} "
    line += f"{t['peer'] / t['ours']:9.0f}x {t['peer'] / t['tuple']:10.0f}x" if "peer" in t else f"{'-':>10} {'-':>11}"
    print(line + f" | {memory['ours']:.1f} {memory['tuple']:.1f}", flush=True)


if __name__ == "__main__":
    main()
