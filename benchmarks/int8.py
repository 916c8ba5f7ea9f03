"""What 8-bit files cost and bring: accuracy, latency of one image, size.

::

    python benchmarks/int8.py                            # random weights, and a student trained on digits
    python benchmarks/int8.py --students wrn_16_1:32 --calls 500
    python benchmarks/int8.py --run runs/student         # a finished run of your own
    python benchmarks/int8.py --slim                     # also the files after onnxslim

Each student is written as ONNX and quantised as by ``refilled export --int8``. It then computes one image by torch, by
onnxruntime in float32 and by onnxruntime in 8 bits, in turn, in one process with one thread. A time is the median of
the processor time of this thread, which computes everything, so that other programs on the machine disturb it little.
Weights do not change these times, so most students have random ones. ``agree`` is the share of images to which both
files give the same class. Accuracy is that on the validation images of the run.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from refilled.config import Run
from refilled.data import Split, Task
from refilled.export.int8 import cost_of, quantize
from refilled.export.onnx_file import OnnxStudent, write_onnx
from refilled.export.student import Deployed, open_student
from refilled.models import Backbone, create_model
from refilled.runs.experiment import distill
from refilled.runs.inference import task_of

STUDENTS = ("wrn_16_1:32", "mobilenet_0.25:84", "timm/mobilenetv3_small_050:96", "timm/resnet18:96")
CLASSES = 10
TURN = 10  # calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--students", nargs="*", default=STUDENTS, help="ARCHITECTURE:PIXELS, with random weights")
    parser.add_argument("--run", type=Path, help="a finished run, instead of training one")
    parser.add_argument("--epochs", type=int, default=15, help="of the student that is trained on digits")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--slim", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, onnxruntime {importlib.import_module('onnxruntime').__version__}, one thread")
    print(f"{'student':36}{'accuracy %':>15}{'agree %':>9}{'torch ms':>9}{'float32':>9}{'int8':>9}{'KiB':>14}")
    with TemporaryDirectory() as folder:
        for place, text in enumerate(options.students):
            name, _, size = text.rpartition(":")
            model = random_student(name, int(size))
            compare(text, model, random_images(int(size)), None, Path(folder) / str(place), options)
        run = options.run or trained(Path(folder) / "run", options.epochs)
        model, task = open_student(run), task_of(run)
        label = f"{model.architecture}:{model.image_size}, {'trained' if options.run is None else run.name}"
        compare(label, model, task.train, task, Path(folder) / "trained", options)


def random_student(name: str, size: int) -> Backbone:
    torch.manual_seed(0)
    model = create_model(name, CLASSES, image_size=size)
    model.class_names = tuple(f"class {number}" for number in range(CLASSES))
    return model.eval()


def random_images(size: int) -> Split:
    pixels = torch.randint(0, 256, (32, 3, size, size), dtype=torch.uint8)
    return Split(pixels, torch.zeros(32, dtype=torch.int64), [str(number) for number in range(32)])


def trained(folder: Path, epochs: int) -> Path:
    """Train a WRN-16-1 on digits."""
    distill(Run(task="digits", student="wrn_16_1", method="vanilla", epochs=epochs, threads=1), folder)
    return folder


def compare(name: str, model: Backbone, images: Split, task: Task | None, folder: Path, options: Any) -> None:
    path, target = folder / "model.onnx", folder / "model.int8.onnx"
    with contextlib.redirect_stdout(sys.stderr):  # the exporter talks
        write_onnx(model, path, preprocess=False)
    measured(name, model, path, target, images, task, options.calls)
    if options.slim:
        slim(path)
        measured("  after onnxslim", model, path, target, images, task, options.calls)


def measured(
    name: str, model: Backbone, path: Path, target: Path, images: Split, task: Task | None, calls: int
) -> None:
    quantize(path, target, images)
    accuracy, agree = "", ""
    if task is not None:
        cost = cost_of(path, target, task, repeats=1)
        accuracy = f"{cost.before.accuracy:.2f} {cost.after.accuracy:.2f}"
        agree = f"{cost.agreement:.1f}"
    deployed = Deployed(model).eval()
    image = deployed.examples(1)
    students = [deployed, OnnxStudent(path), OnnxStudent(target)]
    with torch.no_grad():
        times = "".join(
            f"{each:{width}.2f}" for each, width in zip(timed(students, image, calls), (10, 9, 8), strict=True)
        )
    sizes = " ".join(f"{file.stat().st_size / 1024:.0f}" for file in (path, target))
    print(f"{name:36}{accuracy:>15}{agree:>9}{times}{sizes:>14}", flush=True)


def timed(students: list[Any], image: torch.Tensor, calls: int) -> list[float]:
    """Return the median processor time of each in ms.

    They take turns. The first two calls of a turn do not count: they load the student into the caches.
    """
    found: list[list[float]] = [[] for _ in students]
    for _ in range(1 + calls // TURN):
        for student, times in zip(students, found, strict=True):
            taken = [1000 * processor_time(lambda student=student: student(image)) for _ in range(2 + TURN)]
            times += taken[2:]
    return [statistics.median(times[TURN:]) for times in found]  # the first turn plans and allocates


def processor_time(call: Callable[[], object]) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def slim(path: Path) -> None:
    """Simplify a file with onnxslim, which leaves the metadata out."""
    onnx, onnxslim = importlib.import_module("onnx"), importlib.import_module("onnxslim")
    original = onnx.load(str(path))
    simplified = onnxslim.slim(original)
    onnx.helper.set_model_props(simplified, {prop.key: prop.value for prop in original.metadata_props})
    onnx.save(simplified, str(path))


if __name__ == "__main__":
    main()
