"""What CUDA graphs save: a training step as PyTorch runs it, and with the network's passes recorded and replayed.

On an NVIDIA GPU, made-up images, batches of 64, cross-entropy and the fused optimiser, in bfloat16::

    python benchmarks/graphs.py
    python benchmarks/graphs.py --students resnet20 --batch 128
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F

from refilled.errors import RunError
from refilled.models import create_model
from refilled.runs.determinism import repeat_exactly
from refilled.runs.environment import device_name, find_device
from refilled.training.cuda_graphs import GraphedNetwork

CLASSES = 100


def milliseconds(step: Callable[[], None], steps: int) -> float:
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return 1000 * (perf_counter() - start) / steps


def measure(name: str, size: int, batch: int, steps: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step without graphs, and with."""
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    student = create_model(name, CLASSES, image_size=size).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    graphed = GraphedNetwork(student, "bf16-mixed")

    def learn(logits: torch.Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    def plain() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = student(images).logits
        learn(logits)

    return milliseconds(plain, steps), milliseconds(lambda: learn(graphed(images, frozenset({"logits"})).logits), steps)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--students", nargs="+", default=["mobilenet_0.25@84", "wrn_16_1@32"], help="NAME@PIXELS")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=30)
    given = options.parse_args()
    try:
        device = find_device("cuda")
    except RunError as error:
        raise SystemExit(str(error)) from error
    repeat_exactly(device)
    print(f"torch {torch.__version__}, {device_name(device)}, batch {given.batch}, milliseconds a step")
    print(f"{'':24} {'plain':>8} {'graphs':>8} {'ratio':>7}")
    for text in given.students:
        name, _, size = text.partition("@")
        plain, graphed = measure(name, int(size or 32), given.batch, given.steps, device)
        print(f"{text:24} {plain:8.2f} {graphed:8.2f} {plain / graphed:7.1f}")


if __name__ == "__main__":
    main()
