"""Data larger than memory: a million small images from WebDataset shards, and the memory that each phase takes.

::

    python benchmarks/large.py                                # 100,000 images of 32 x 32, 0.8 GB of disk
    python benchmarks/large.py --images 1000000               # 8 GB of disk
    python benchmarks/large.py --images 1000000 --folder big  # resumes an earlier start, and keeps the files

The shards are made up (uncompressed pictures of noise, so that making them costs little), decoded into the store on
disk, and gone through for an epoch in random order and augmented, as in training; then the smallest network takes some
steps. "Load again" is what every later start costs: the headers are read, and every image is checked.

For each phase: its seconds, the most memory that was the process's own (``own``: heap and stacks, ``RssAnon`` in
proc(5)), and the most of mapped files that happened to lie in memory (``mapped``, which the system takes back when it
needs room).
"""

import argparse
import io
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from refilled.data import augment, channel_statistics, epoch_batches, load_task
from refilled.models import create_model

SIDE, CLASSES, SHARD, BATCH = 32, 100, 20_000, 256
TRAINING_STEPS = 50


class Meter(threading.Thread):
    """Reads the process's memory ten times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.reset()

    def reset(self) -> None:
        """Start a new measurement."""
        self.own = self.mapped = 0.0

    def run(self) -> None:
        """Measure until the process ends."""
        while True:
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        """Measure once."""
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":") for line in lines)
        own, mapped = (int(values[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
        self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)


@contextmanager
def phase(meter: Meter, name: str, images: int) -> Iterator[None]:
    meter.reset()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    meter.look()
    print(f"{name:>24} {seconds:9.1f} {images / seconds:11,.0f} {meter.own:9.0f} {meter.mapped:9.0f}", flush=True)


def write_shards(folder: Path, part: str, images: int) -> None:
    """Write what is missing of a part's shards."""
    for start in range(0, images, SHARD):
        path = folder / f"{part}-{start // SHARD:04}.tar"
        if path.exists():
            continue
        chance = np.random.default_rng([len(part), start])
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for number in range(start, min(start + SHARD, images)):
                label = number % CLASSES
                pixels = chance.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                picture = b"P6 %d %d 255 " % (SIDE, SIDE) + pixels.tobytes()
                for ending, content in (("ppm", picture), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        path.with_suffix(".part").rename(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--folder", type=Path, help="where everything lies and stays; else a folder that is removed")
    given = options.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as passing:
        folder = given.folder or Path(passing)
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        os.environ["REFILLED_CACHE"] = str(folder / "cache")
        measure(folder / "shards", given.images)


def measure(shards: Path, images: int) -> None:
    meter = Meter()
    meter.start()
    print(f"{images:,} images of {SIDE} x {SIDE}: {images * 3 * SIDE**2 / 2**20:,.0f} MiB decoded; memory in MiB")
    print(f"{'phase':>24} {'seconds':>9} {'images/s':>11} {'own':>9} {'mapped':>9}")
    with phase(meter, "make the shards", images):
        for part, count in (("train", images), ("val", 1000), ("test", 1000)):
            write_shards(shards, part, count)
    with phase(meter, "load, first time", images):
        task = load_task(f"wds:{shards}", memory_limit=0)
    with phase(meter, "load again", images):
        task = load_task(f"wds:{shards}", memory_limit=0)
    with phase(meter, "channel statistics", images):
        mean, std = channel_statistics(task.train.pixels)
    labels = task.train.labels
    with phase(meter, "an epoch of batches", images):
        for batch in epoch_batches(labels, batch_size=BATCH, seed=0, epoch=0):
            augment(task.train.pixels.index_select(0, batch), batch, seed=0, view=0, kind="crop-flip")
    student = create_model("wrn_10_1", CLASSES, image_size=SIDE, mean=mean, std=std)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    with phase(meter, f"{TRAINING_STEPS} training steps", TRAINING_STEPS * BATCH):
        for batch in islice(epoch_batches(labels, batch_size=BATCH, seed=0, epoch=1), TRAINING_STEPS):
            seen = augment(task.train.pixels.index_select(0, batch), batch, seed=0, view=1, kind="crop-flip")
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(student(seen).logits, labels[batch]).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
