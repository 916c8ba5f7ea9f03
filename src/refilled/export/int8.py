"""Static quantisation of ONNX students to 8 bits, and what it costs and gains."""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from refilled.data import Split
from refilled.errors import RunError
from refilled.export.onnx_file import OnnxStudent, need

_CALIBRATION = 256  # images
_BATCH = 32
_LAYERS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Measured:
    """An ONNX student on the test images."""

    accuracy: float | None
    """Percent; None without images."""
    milliseconds: float
    """Median latency of one image."""
    size: int
    """Bytes of the file."""


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
    student = OnnxStudent(path)
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
            op_types_to_quantize=list(_LAYERS),
        )
    original, written = onnx.load(str(path)), onnx.load(str(target))
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


def measure(path: Path, test: Split, repeats: int = 50) -> Measured:
    """Score an ONNX student on test images, and time it on one image."""
    student = OnnxStudent(path)
    right = 0
    for start in range(0, len(test), _BATCH):
        (pixels,) = test.pixels[start : start + _BATCH].split(_BATCH)
        right += int((student(student.prepare(pixels)).argmax(1) == test.labels[start : start + _BATCH]).sum())
    size = student.metadata["size"]
    image = student.prepare(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    times = []
    for _ in range(repeats):
        begun = perf_counter()
        student(image)
        times.append(perf_counter() - begun)
    accuracy = 100 * right / len(test) if len(test) else None
    return Measured(accuracy, 1000 * median(times), path.stat().st_size)


def _calibration(student: OnnxStudent, train: Split) -> Iterator[dict[str, Any]]:
    rows = torch.linspace(0, len(train) - 1, min(_CALIBRATION, len(train))).round().long()
    for part in rows.split(_BATCH):
        yield {"images": student.prepare(train.pixels[part]).contiguous().numpy()}


class _Reader:
    """The interface by which onnxruntime takes batches for calibration."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._batches
