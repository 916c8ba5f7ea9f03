"""Static quantisation of ONNX students to 8 bits, and what it costs and gains."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from refilled.data import Split, Task, spread
from refilled.errors import RunError
from refilled.export.onnx_file import OnnxStudent, need

_CALIBRATION = 256  # images
_SAMPLE = 1000  # training images
_BATCH = 32
_LAYERS = ("Conv", "MatMul", "Gemm")
_BETWEEN = ("Add", "GlobalAveragePool", "MaxPool", "Mul", "Relu")
"""Operations between layers. In 8 bits they save conversions, which take longer than the layers of small networks."""


@dataclass(frozen=True)
class Measured:
    """An ONNX student on labelled images."""

    accuracy: float | None
    """Percent; None without images."""
    milliseconds: float
    """Median latency of one image."""
    size: int
    """Bytes of the file."""


@dataclass(frozen=True)
class Cost:
    """A student before and after quantisation, on the same images."""

    part: str
    """The images: ``validation`` or ``training``."""
    images: int
    before: Measured
    after: Measured
    agreement: float | None
    """Percent of the images that both give the same class; None without images."""


def quantize(path: Path, target: Path, train: Split) -> tuple[int, int]:
    """Quantise an ONNX student to 8 bits; the ranges of its activations are those of training images.

    Returns:
        How many convolutions and matrix products compute in 8 bits, and how many there are.

    Raises:
        RunError: The packages are missing, there are no training images, or nothing was quantised.
    """
    onnx = need("onnx", "onnxruntime")
    quantization = need("onnxruntime.quantization")
    pre = need("onnxruntime.quantization.shape_inference")
    if not len(train):
        raise RunError("--int8 needs training images for calibration, and the run has none")
    student, original = OnnxStudent(path), onnx.load(str(path))
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = Path(scratch) / "prepared.onnx"
        pre.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            _Reader(_calibration(student, train)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,  # faster on x86 than signed ones
            op_types_to_quantize=_quantizable(original),
        )
    written = onnx.load(str(target))
    # The metadata may get lost on the way.
    onnx.helper.set_model_props(written, {prop.key: prop.value for prop in original.metadata_props})
    onnx.save(written, str(target))
    quantized, all_layers = count_quantized(written)
    if not quantized:
        raise RunError(f"{target}: none of the {all_layers} convolutions and matrix products was quantised")
    return quantized, all_layers


def count_quantized(model: Any) -> tuple[int, int]:
    """Count the convolutions and matrix products of an ONNX graph with dequantised inputs and weights, and all."""
    dequantized = {out for node in model.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    layers = [node for node in model.graph.node if node.op_type in _LAYERS]
    return sum(set(node.input[:2]) <= dequantized for node in layers), len(layers)


def _quantizable(model: Any) -> list[str]:
    """Return the types of operations to quantise: in transformers, whose sums have wide ranges, the layers alone."""
    transformer = any(node.op_type == "LayerNormalization" for node in model.graph.node)
    return list(_LAYERS if transformer else _LAYERS + _BETWEEN)


def cost_of(path: Path, target: Path, task: Task, repeats: int = 100) -> Cost:
    """Compare a quantised student with the original.

    The images are the validation images of the run, or without these up to 1,000 training images. The test images are
    not read, because they must not decide which file is used.

    Args:
        path: The original.
        target: The quantised file.
        task: The task of the run.
        repeats: How often each file computes one image, in turn.
    """
    part, split = ("validation", task.val) if len(task.val) else ("training", task.train)
    rows = (split.labels >= 0).nonzero().flatten()
    rows = rows[spread(len(rows), _SAMPLE if part == "training" else len(rows))]
    students = [OnnxStudent(path), OnnxStudent(target)]
    labels = split.labels[rows]
    found = [_classes(student, split, rows) for student in students]
    times = latencies(students, repeats)
    accuracies = [_percent(classes == labels) for classes in found]
    before, after = (
        Measured(accuracy, milliseconds, file.stat().st_size)
        for accuracy, milliseconds, file in zip(accuracies, times, (path, target), strict=True)
    )
    return Cost(part, len(rows), before, after, _percent(found[0] == found[1]))


def latencies(students: Sequence[OnnxStudent], repeats: int) -> list[float]:
    """Return the median time in ms in which each student computes one image; the students take turns."""
    taken: list[list[float]] = [[] for _ in students]
    size = students[0].metadata["size"]
    image = students[0].preprocess(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    for student in students:  # the first call plans and allocates
        student(image)
    for _ in range(repeats):
        for student, times in zip(students, taken, strict=True):
            begun = perf_counter()
            student(image)
            times.append(1000 * (perf_counter() - begun))
    return [median(times) for times in taken]


def _classes(student: OnnxStudent, split: Split, rows: Tensor) -> Tensor:
    parts = [student(student.preprocess(split.pixels[part])).argmax(1) for part in rows.split(_BATCH) if len(part)]
    return torch.cat(parts) if parts else rows


def _percent(right: Tensor) -> float | None:
    return 100 * right.double().mean().item() if len(right) else None


def _calibration(student: OnnxStudent, train: Split) -> Iterator[dict[str, Any]]:
    for part in spread(len(train), _CALIBRATION).split(_BATCH):
        yield {"images": student.preprocess(train.pixels[part]).contiguous().numpy()}


class _Reader:
    """The interface by which onnxruntime takes batches for calibration."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches
