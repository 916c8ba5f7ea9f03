"""Training steps of students and forward passes of teachers, in float32, in bfloat16 and as ``--precision auto`` does.

``python benchmarks/precision.py --size 96`` times timm networks with random weights, in turn in one process. The
column *plain bf16* is autocast over timm's own network; *mixed* is the same with depthwise convolutions in float32.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from time import perf_counter

import timm
import torch
from torch import Tensor, nn

from refilled.models.mixed_convolution import mix_convolutions

STUDENTS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "regnety_004",
    "ghostnet_100",
    "convnext_nano",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
]
TEACHERS = [
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_tiny",
    "regnety_008",
    "vit_small_patch16_224",
    "vit_small_patch14_dinov2",
]


def main() -> None:
    """Print a table of images per second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side; 224 for vision transformers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each network, at least three rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["students", "teachers"])
    parser.add_argument("names", nargs="*", help="timm networks instead of the default ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only != "teachers":
        print("| student | float32 | plain bf16 | mixed | auto / best | mixed / better of the plain |")
        print("|---|---:|---:|---:|---:|---:|")
        for name in options.names or STUDENTS:
            speed = measure(name, options, train)
            chosen = speed["float32" if speed["float32"] > speed["mixed"] / 0.97 else "mixed"]
            plain = max(speed["float32"], speed["plain bf16"])
            row(name, speed, chosen / max(speed.values()), speed["mixed"] / plain)
    if options.only != "students":
        print("\n| teacher | float32 | plain bf16 | mixed | mixed / best |\n|---|---:|---:|---:|---:|")
        for name in options.names or TEACHERS:
            speed = measure(name, options, teach)
            row(name, speed, speed["mixed"] / max(speed.values()))


def row(name: str, speed: dict[str, float], *ratios: float) -> None:
    """Print a row of the table."""
    print(
        f"| {name} |",
        *(f"{rate:.1f} |" for rate in speed.values()),
        *(f"{ratio:.2f} |" for ratio in ratios),
        flush=True,
    )


def measure(
    name: str, options: argparse.Namespace, step: Callable[[nn.Module, Tensor, bool], object]
) -> dict[str, float]:
    """Return images per second of the fastest of several steps, in each format."""
    fixed = any(part in name for part in ("vit", "deit"))
    size = 224 if fixed else options.size
    sized = {"img_size": 224} if "vit" in name else {}
    plain = timm.create_model(name, num_classes=10, **sized).to(memory_format=torch.channels_last)
    mixed_copy = deepcopy(plain)
    mix_convolutions(mixed_copy)
    batch = options.batch // 4 if fixed else options.batch
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    ways = {"float32": (plain, False), "plain bf16": (plain, True), "mixed": (mixed_copy, True)}
    best = dict.fromkeys(ways, float("inf"))
    for network, mixed in ways.values():
        step(network, images, mixed)
    start, rounds = perf_counter(), 0
    while rounds < 3 or perf_counter() - start < options.seconds:
        for way, (network, mixed) in ways.items():
            before = perf_counter()
            step(network, images, mixed)
            best[way] = min(best[way], perf_counter() - before)
        rounds += 1
    return {way: batch / seconds for way, seconds in best.items()}


def train(network: nn.Module, images: Tensor, mixed: bool) -> None:
    """Run forward and backward of a student."""
    network.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = network(images)
    logits.float().square().mean().backward()


@torch.no_grad()
def teach(network: nn.Module, images: Tensor, mixed: bool) -> None:
    """Run forward of a teacher."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        network.eval()(images)


if __name__ == "__main__":
    main()
