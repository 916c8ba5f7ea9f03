"""The time of ``refilled predict`` beside decoding its pictures and running the network.

::

    python benchmarks/predict.py                     # 2,000 JPEGs of 100 to 500 pixels, all cores
    python benchmarks/predict.py --images 10000
    python benchmarks/predict.py --photos FOLDER     # your own pictures
    python benchmarks/predict.py --parquet FILE      # enlarges the pictures of a table into JPEGs

Two students with random weights: timm's ``mobilenetv3_small_050`` at 224 pixels, and ``wrn_10_1`` at 32. In each round,
one after the other on the same files: decoding alone (``read_pixels``), the bare forward pass alone (the network on
ready batches, in eval mode), and the command with ``--csv``, without the start of Python. ``ratio`` is
(decoding + forward) / command, the median over the rounds: 1 means that the command adds nothing to its parts. More
than 1 means that it does both at the same time. ``cores`` is processor time / time of the command.

Then the latency of one picture, a batch of 1 that is decoded already, by torch and by onnxruntime.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from refilled.cli.use import predict
from refilled.data.decode import read_pixels
from refilled.export.onnx_file import OnnxStudent, write_onnx
from refilled.models import Backbone, create_model, save_model
from refilled.runs.classifying import BATCH

STUDENTS = {"timm/mobilenetv3_small_050": 224, "wrn_10_1": 32}
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--photos", type=Path, help="a folder of pictures")
    source.add_argument("--parquet", type=Path, help="a table with a column of encoded pictures, img")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        photos = options.photos or make_photos(Path(folder) / "photos", options.images, options.parquet)
        files = sorted(path for path in photos.rglob("*") if path.is_file())
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
        print(f"{len(files)} pictures, {kilobytes:.0f} kB each; {options.threads} threads; torch {torch.__version__}")
        print(f"{'':28}{'decode s':>10}{'forward s':>11}{'command s':>11}{'images/s':>10}{'cores':>7}{'ratio':>7}")
        students = {name: make_student(name, Path(folder)) for name in STUDENTS}
        for name, model in students.items():
            compare(name, model, Path(folder) / name, photos, files, options.rounds)
        print(f"\n{'latency of one picture, ms':28}{'torch':>10}{'onnxruntime':>13}{'ratio':>8}")
        for name, model in students.items():
            compare_latency(name, model, Path(folder) / "model.onnx", options.rounds)


def make_photos(folder: Path, count: int, table: Path | None) -> Path:
    """Write JPEGs of 100 to 500 pixels: enlarged pictures of a table, or noise with the spectrum of photographs."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    small = pictures_of(table) if table is not None else made_up(chance)
    for number in range(count):
        size = tuple(int(side) for side in chance.integers(100, 501, 2))
        small[number % len(small)].resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:05}.jpg", quality=90)
    return folder


def pictures_of(table: Path) -> list[Image.Image]:
    import pyarrow.parquet as pq

    encoded = pq.read_table(table, columns=["img"])["img"].to_pylist()
    encoded = [each["bytes"] if isinstance(each, dict) else each for each in encoded]
    return [Image.open(io.BytesIO(each)).convert("RGB") for each in encoded]


def made_up(chance: np.random.Generator) -> list[Image.Image]:
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    pictures = []
    for _ in range(50):
        noise = np.fft.fft2(chance.normal(size=(3, 128, 128))) / np.maximum(frequencies, 1 / 128)
        waves = np.fft.ifft2(noise).real.transpose(1, 2, 0)
        pictures.append(Image.fromarray((128 + 50 * waves / waves.std()).clip(0, 255).astype(np.uint8)))
    return pictures


def make_student(name: str, folder: Path) -> Backbone:
    model = create_model(name, CLASSES)
    model.image_size, model.class_names = STUDENTS[name], tuple(f"class {number}" for number in range(CLASSES))
    save_model(model, folder / name)
    return model.eval()


def compare(name: str, model: Backbone, run: Path, photos: Path, files: list[Path], rounds: int) -> None:
    size = STUDENTS[name]
    times: list[tuple[float, float, float]] = []
    cores = []
    for _ in range(rounds):
        decoding = seconds(lambda: decode_all(files, size))
        forward = seconds(lambda: forward_all(model, len(files), size))
        begun = time.process_time()
        command = seconds(lambda: run_command(run, photos))
        cores.append((time.process_time() - begun) / command)
        times.append((decoding, forward, command))
    decoding, forward, command = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median((d + f) / c for d, f, c in times)
    rate = len(files) / command
    used = statistics.median(cores)
    print(f"{name:28}{decoding:10.2f}{forward:11.2f}{command:11.2f}{rate:10.0f}{used:7.2f}{ratio:7.2f}", flush=True)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def decode_all(files: list[Path], size: int) -> None:
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        read_pixels(batch, len(batch), size)


@torch.no_grad()
def forward_all(model: Backbone, count: int, size: int) -> None:
    pixels = torch.randint(0, 256, (BATCH, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for start in range(0, count, BATCH):
        model(pixels[: count - start]).logits.softmax(1)


def run_command(run: Path, photos: Path) -> None:
    # The decorated function of the command line, which loads the student as well.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123
        predict(run, [photos], as_csv=True)


@torch.no_grad()
def compare_latency(name: str, model: Backbone, file: Path, rounds: int) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # the exporter talks
        write_onnx(model, file, preprocess=False)
    student = OnnxStudent(file)
    pixels = torch.randint(0, 256, (1, 3, STUDENTS[name], STUDENTS[name]), dtype=torch.uint8)
    calls = {"torch": lambda: model(pixels), "onnxruntime": lambda: student(student.preprocess(pixels))}
    found: dict[str, list[float]] = {kind: [] for kind in calls}
    for call in range(20 * rounds + 5):
        for kind, function in calls.items():
            taken = seconds(function)
            if call >= 5:  # the first ones plan and allocate
                found[kind].append(1000 * taken)
    torchs, onnxs = (statistics.median(values) for values in found.values())
    print(f"{name:28}{torchs:10.2f}{onnxs:13.2f}{torchs / onnxs:8.1f}", flush=True)


if __name__ == "__main__":
    main()
