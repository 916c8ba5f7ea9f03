"""How well ``--dry-run`` predicts: a third size from two, and the time and peak memory of real runs.

::

    python benchmarks/cost.py            # about three minutes on one thread
    python benchmarks/cost.py --quick    # seconds: the smallest pair of networks, and no real runs

First table: the milliseconds of a step at a third batch size or image size, from the line through two smaller ones; the
cost of an image grows with its area. The sizes take turns, and each time is the median over the rounds. Second table:
runs in processes of their own, started by the command line, beside the prediction of ``--dry-run``. Seconds are those
in ``result.json``; memory is the largest resident set that the system saw. Third table: a model of what this machine
cannot measure, from rates of a GPU that are assumed and from :class:`refilled.cost.step.Network`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from lightning_fabric import Fabric

from refilled.config import Run
from refilled.cost.run import communication, duration
from refilled.cost.step import Line, Network, Probe
from refilled.data import TaskSize
from refilled.methods.refilled import refilled
from refilled.models import create_model
from refilled.models.backbone import freeze
from refilled.runs.prepared import resolve

PAIRS = (("wrn_16_1", "wrn_16_2", 32), ("resnet20", "wrn_40_1", 32), ("mobilenet_0.5", "wrn_16_2", 64))
"""Student, teacher, and the smallest image size; MobileNet is another network below 64 pixels."""
RUNS = (
    ("wrn_16_2", "vanilla", {"epochs": 2, "batch_size": 128}, "digits@size=32"),
    ("resnet20", "refilled", {"epochs": 4, "batch_size": 64}, "digits:5-9@size=32"),
    ("mobilenet_0.5", "refilled", {"epochs": 2, "batch_size": 32}, "digits:5-9@size=64"),
    ("wrn_16_1", "rkd", {"epochs": 8, "batch_size": 256}, "digits:5-9@size=32"),
)
CLASSES = tuple("0123456789")


def step_seconds(student: str, teacher: str, batch: int, pixels: int) -> float:
    """Seconds of a step of one-stage ReFilled at just this size."""
    run = resolve(Run(task="made up", student=student, batch_size=batch, device="cpu", threads=1))
    networks = [create_model(name, len(CLASSES), image_size=pixels) for name in (student, teacher)]
    (stage,) = refilled(networks[0], freeze(networks[1]), gamma=0.1)
    fabric = Fabric(accelerator="cpu", devices=1, precision=run.precision)
    size = TaskSize(CLASSES, 0, 0, 0, pixels, "crop-flip", 0.0)
    return Probe(*networks, stage, size, run, fabric).step_cost((batch, batch)).seconds(batch)


def third_from_two(rounds: int, pairs: tuple[tuple[str, str, int], ...]) -> None:
    print(f"{'student':>14} {'teacher':>9} {'third':>10} {'of':>16} {'predicted':>9} {'measured':>9} {'ratio':>6}")
    for student, teacher, side in pairs:
        rows = {"batch": [(batch, 32) for batch in (8, 32, 128)], "image size": [(4, side << n) for n in range(3)]}
        for what, sizes in rows.items():
            taken = [[step_seconds(student, teacher, *size) for size in sizes] for _ in range(rounds)]
            one, two, three = (1000 * median(column) for column in zip(*taken, strict=True))
            amounts = [batch * pixels**2 for batch, pixels in sizes]
            predicted = Line.through((amounts[0], one), (amounts[1], two))(amounts[2])
            size = "{} x {} px".format(*sizes[2])
            cells = f"{predicted:9.0f} {three:9.0f} {predicted / three:6.2f}"
            print(f"{student:>14} {teacher:>9} {what:>10} {size:>16} {cells}", flush=True)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from refilled.cli import main; main()", *map(str, arguments)]


def real_runs(folder: Path, runs: tuple[tuple[str, str, dict[str, int], str], ...]) -> None:
    teacher = folder / "teacher"
    subprocess.run(
        command("train", "digits:0-4@size=32", "--model", "wrn_16_2", "--epochs", 1, "--quiet", "--out", teacher),
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    columns = ("predicted s", "measured s", "ratio", "predicted MiB", "measured MiB", "ratio")
    print(f"{'run':>60} " + " ".join(f"{name:>13}" for name in columns))
    for student, method, training, task in runs:
        flags = [part for name, value in training.items() for part in (f"--{name.replace('_', '-')}", value)]
        flags += ["--student", student, "--threads", 1, "--device", "cpu"]
        flags += ["--method", method, *([] if method == "vanilla" else ["--teacher", teacher])]
        said = subprocess.run(
            command("distill", task, *flags, "--dry-run", "--json"), check=True, capture_output=True, text=True
        )
        forecast = json.loads(said.stdout)
        out = folder / f"{student}-{method}"
        process = subprocess.Popen(command("distill", task, *flags, "--quiet", "--json", "--out", out), stdout=-3)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds = json.loads((out / "result.json").read_text())["seconds"]
        memory, peak = forecast["memory"] / 2**20, usage.ru_maxrss / 1024
        numbers = (forecast["seconds"]["training"], seconds, 0.0, memory, peak, 0.0)
        numbers = (*numbers[:2], numbers[0] / numbers[1], *numbers[3:5], memory / peak)
        name = f"{student} {method} {task} batch {training['batch_size']}"
        print(f"{name:>60} " + " ".join(f"{number:13.2f}" for number in numbers), flush=True)


def modelled(student_rate: float, teacher_rate: float) -> None:
    """Print one-stage ReFilled from a ResNet-50 to a ResNet-18 at 224 x 224, 128 images per GPU."""
    print(f"modelled: a GPU trains {student_rate:,.0f} and embeds {teacher_rate:,.0f} images/s; {Network()}")
    print(f"{'classes':>8} {'images':>12} {'GPUs':>5} {'step ms':>8} {'messages':>9} {'images/s':>9} {'epoch':>14}")
    for classes, images in ((1_000, 1_281_167), (21_841, 14_197_122)):
        with torch.device("meta"):  # only their shapes are needed, not their weights
            names = ("timm/resnet18", "timm/resnet50")
            student, teacher = (create_model(name, classes, image_size=224) for name in names)
        (stage,) = refilled(student, freeze(teacher), gamma=0.1)
        for ranks in (1, 8, 64):
            batch = 128 * ranks
            messages = communication(student, [teacher], stage, batch, ranks, Network())
            step = 128 / student_rate + 128 / teacher_rate + messages
            numbers = f"{1000 * step:8.0f} {1000 * messages:9.1f} {batch / step:9,.0f}"
            print(f"{classes:8,} {images:12,} {ranks:5} {numbers} {duration(images * step / batch):>14}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the smallest pair of networks, and no real runs")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--student-rate", type=float, default=2500.0, help="images/s of a GPU, in the third table")
    options.add_argument("--teacher-rate", type=float, default=5000.0, help="images/s of a GPU, in the third table")
    given = options.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread; milliseconds of a step of one-stage ReFilled")
    third_from_two(1 if given.quick else given.rounds, PAIRS[:1] if given.quick else PAIRS)
    if not given.quick:
        with TemporaryDirectory() as folder:
            real_runs(Path(folder), RUNS)
    modelled(given.student_rate, given.teacher_rate)


if __name__ == "__main__":
    main()
