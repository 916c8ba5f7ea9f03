"""Embedding of a task's images by a teacher for the cache, beside the teacher's bare forward pass, in turn.

``python benchmarks/embedding.py --teacher resnet50 --size 224`` makes random images of ``--image-size`` pixels. The
bare pass is timm's network, channels-last, in the same precision, over batches that lie ready in memory.
"""

import argparse
import tempfile
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter

import timm
import torch
from torch import Tensor

from refilled.config import Run
from refilled.data import Split, Task, Views
from refilled.models import freeze
from refilled.models.timm_backbone import TimmBackbone
from refilled.runs.prepared import resolve
from refilled.runs.teacher_caches import embedder, fabric_of
from refilled.training.teacher_cache import teacher_cache

BATCH = 256


def main() -> None:
    """Print images per second of both, and the median ratio of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", nargs="+", default=["resnet50", "mobilenetv2_100", "vit_small_patch16_224"])
    parser.add_argument("--size", type=int, default=224, help="pixels that the teacher sees")
    parser.add_argument("--image-size", type=int, default=84, help="pixels of the task's images")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| teacher | cache, images/s | bare forward, images/s | ratio |\n|---|---:|---:|---:|")
    for name in options.teacher:
        cached, bare = zip(*(measure(name, options, number) for number in range(options.rounds)), strict=True)
        ratio = median(b / c for c, b in zip(cached, bare, strict=True))
        print(f"| {name} | {options.images / median(cached):.1f} | {options.images / median(bare):.1f} | {ratio:.2f} |")


def measure(name: str, options: argparse.Namespace, number: int) -> tuple[float, float]:
    """Return the seconds of a build of the cache, and of the bare forward pass."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(
        256, (options.images, 3, options.image_size, options.image_size), dtype=torch.uint8, generator=generator
    )
    task = task_of(pixels)
    network = timm.create_model(name, num_classes=10).eval().to(memory_format=torch.channels_last)
    teacher = freeze(TimmBackbone(deepcopy(network)))
    teacher.set_preprocessing(input_size=options.size)
    run = resolve(Run(task="digits", student="wrn_10_1", teacher="x", views=1, threads=options.threads))
    ready = torch.randn(BATCH, 3, options.size, options.size).to(memory_format=torch.channels_last)
    fabric = fabric_of(run)
    with tempfile.TemporaryDirectory() as folder:
        cache = teacher_cache(Path(folder), teacher, task, number=1, views=Views("crop-flip"), precision=run.precision)
        before = perf_counter()
        cache.build(task, embedder(teacher, fabric))
        cached = perf_counter() - before
    before = perf_counter()
    with torch.no_grad(), fabric.autocast():
        for start in range(0, options.images, BATCH):
            network.forward_features(ready[: min(BATCH, options.images - start)])
    return cached, perf_counter() - before


def task_of(pixels: Tensor) -> Task:
    """Return a task of these images."""
    labels = torch.arange(len(pixels)) % 10
    split = Split(pixels, labels, tuple(map(str, range(len(pixels)))))
    return Task("random", tuple("0123456789"), split, split, split, pixels.shape[-1], "crop-flip", fingerprint="random")


if __name__ == "__main__":
    main()
