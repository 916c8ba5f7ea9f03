"""Images per second of the input pipeline, compared with torchvision's.

For instance::

    python benchmarks/data.py                       # small pictures and photographs, about two minutes
    python benchmarks/data.py --kinds photographs --rounds 9

Both read the same folders of class folders and end in normalised float32 batches of 128. ``small`` are PNGs of 32
pixels, cropped and mirrored as CIFAR's; ``photographs`` are JPEGs of 500 × 375 for networks of 224 pixels. The pictures
are noise whose spectrum falls like that of photographs (amplitude 1 / frequency), so that they compress like some.

``first epoch`` is ours from nothing: find the files, decode each once, look for copies, take checksums, then one
epoch of augmented batches. ``later epochs`` is the cost of every other epoch. ``torchvision, N workers`` is an epoch of
``ImageFolder``, its transforms and a ``DataLoader``, which decodes every picture in every epoch; its workers live on
between epochs. Wall-clock time, contestants in turn, medians; each ratio is the median of those within a round. Ours
decodes with as many threads as torch has, ``--threads``.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from refilled.data import Task, augment, epoch_batches, load_task
from refilled.models import create_model

CLASSES, BATCH = 10, 128
MEAN, STD = [0.5] * 3, [0.5] * 3


@dataclass(frozen=True)
class Kind:
    """A kind of picture, and what is made of it."""

    width: int
    height: int
    suffix: str
    size: int
    """Side length of the images that a network sees."""
    count: int
    workers: tuple[int, ...] = (0, 1, 2)


KINDS = {
    "small": Kind(32, 32, ".png", 32, count=4000),
    "photographs": Kind(500, 375, ".jpg", 224, count=256),
}


def draw(kind: Kind, generator: np.random.Generator) -> Image.Image:
    """Noise whose amplitude falls with frequency, of its own in each channel but mostly shared."""
    frequency = np.hypot(np.fft.fftfreq(kind.height)[:, None], np.fft.rfftfreq(kind.width)[None])
    frequency[0, 0] = 1
    shape = (kind.height, kind.width, 1 + 3)
    noise = np.fft.rfft2(generator.standard_normal(shape), axes=(0, 1)) / frequency[..., None]
    levels = np.fft.irfft2(noise, s=shape[:2], axes=(0, 1))
    levels = levels[..., :1] + 0.3 * levels[..., 1:]
    return Image.fromarray((128 + 50 * levels / levels.std()).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, kind: Kind) -> int:
    """Write class folders to train on, and one picture per class to test on; return the bytes of one."""
    generator = np.random.default_rng(0)
    for part, count in (("train", kind.count), ("test", CLASSES)):
        for index in range(count):
            path = folder / part / f"class-{index % CLASSES}" / f"{index:05d}{kind.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(kind, generator).save(path, quality=90)
    return sum(path.stat().st_size for path in (folder / "train").rglob("*.*")) // kind.count


def epoch_of_ours(task: Task, normalize: Callable[[Tensor], Tensor], epoch: int) -> None:
    train = task.train
    for batch in epoch_batches(train.labels, batch_size=BATCH, seed=0, epoch=epoch):
        pixels = train.pixels.index_select(0, batch)
        normalize(augment(pixels, batch, seed=0, view=epoch, kind=task.augmentation))


def of_torchvision(folder: Path, kind: Kind, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    square: list[Callable[..., object]] = [transforms.Resize(kind.size), transforms.CenterCrop(kind.size)]
    steps = [
        *(square if kind.width != kind.size else []),
        transforms.RandomCrop(kind.size, padding=kind.size // 8, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    pictures = ImageFolder(str(folder / "train"), transforms.Compose(steps))
    return DataLoader(pictures, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def exhaust(loader: Iterable[object]) -> None:
    for _ in loader:
        pass


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def measure(name: str, kind: Kind, rounds: int, folder: Path) -> None:
    size_of_one = write_pictures(folder, kind)
    normalize = create_model("wrn_10_1", CLASSES, image_size=kind.size, mean=MEAN, std=STD).normalize
    loaders = {f"torchvision, {n} workers": of_torchvision(folder, kind, n) for n in kind.workers}
    taken: dict[str, list[float]] = {row: [] for row in ("first epoch", "later epochs", *loaders)}
    for loader in loaders.values():
        exhaust(loader)  # its workers are started, the files are in memory
    for number in range(rounds):
        start = perf_counter()
        task = load_task(str(folder), val=0, image_size=kind.size)
        epoch_of_ours(task, normalize, 2 * number)
        taken["first epoch"].append(perf_counter() - start)
        taken["later epochs"].append(seconds(lambda task=task, n=number: epoch_of_ours(task, normalize, 2 * n + 1)))
        for row, loader in loaders.items():
            taken[row].append(seconds(lambda loader=loader: exhaust(loader)))
    print(f"\n{kind.count} {name}, {kind.width} × {kind.height}, {size_of_one:,} bytes each, for {kind.size} pixels")
    print(f"{'':24} {'images/s':>9}  times that of torchvision with {', '.join(map(str, kind.workers))} workers")
    for row, times in taken.items():
        ratios = [median(b / a for a, b in zip(times, taken[other], strict=True)) for other in loaders]
        shown = "" if row in loaders else " ".join(f"{ratio:8.2f}" for ratio in ratios)
        print(f"{row:24} {kind.count / median(times):9.0f}  {shown}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--quick", action="store_true", help="few pictures and one round: does it still run?")
    given = options.parse_args()

    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, median of {1 if given.quick else given.rounds} rounds")
    for name in given.kinds:
        kind, rounds = KINDS[name], given.rounds
        if given.quick:
            kind, rounds = Kind(kind.width, kind.height, kind.suffix, kind.size, count=40, workers=(0,)), 1
        with tempfile.TemporaryDirectory() as folder:
            measure(name, kind, rounds, Path(folder))


if __name__ == "__main__":
    main()
