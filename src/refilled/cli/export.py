"""The command ``export``: a student as a file for other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refilled.cli.options import Folder
from refilled.cli.show import say
from refilled.errors import RunError, unknown
from refilled.words import count_of, printable

if TYPE_CHECKING:
    from refilled.export.int8 import Cost

_NAMES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "weights"}


def export(
    folder: Folder,
    format_: Annotated[str, typer.Option("--format", help="Format of the file: onnx, torch or safetensors.")] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; for safetensors, a folder. Default: in RUN/export.", show_default=False),
    ] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Include normalisation in the file, which then takes uint8 images.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Also write FILE.int8.onnx in 8 bits, and compare accuracy and speed."),
    ] = False,
) -> None:
    """Export a student to a file that runs without this package, and check it against torch."""
    if format_ not in _NAMES:
        raise RunError(unknown("format", format_, _NAMES))
    if int8 and format_ != "onnx":
        raise RunError(f"--int8 quantises ONNX files; leave out --format {format_}")
    if preprocess and format_ == "safetensors":
        raise RunError("--preprocess needs --format onnx or torch; a safetensors file contains only weights")
    from refilled.export.student import open_student

    model = open_student(folder)
    path = out or folder / "export" / _NAMES[format_]
    if format_ != "safetensors" and path.is_dir():
        raise RunError(f"{path} is a folder; give a file, as in --out {path / _NAMES[format_]}")
    try:
        if format_ == "onnx":
            from refilled.export.onnx_file import write_onnx

            difference = write_onnx(model, path, preprocess)
        elif format_ == "torch":
            from refilled.export.packages import write_program

            difference = write_program(model, path, preprocess)
        else:
            from refilled.export.packages import write_weights

            difference = write_weights(model, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    say(f"wrote {printable(str(path))}; its logits differ from torch by at most {difference:.1g}")
    if int8:
        _quantize(folder, path)


def _quantize(folder: Path, path: Path) -> None:
    from refilled.export.int8 import cost_of, quantize
    from refilled.runs.inference import task_of

    task, target = task_of(folder), path.with_suffix(".int8.onnx")
    quantized, layers = quantize(path, target, task.train)
    say(f"wrote {printable(str(target))}; {quantized} of {layers} convolutions and matrix products are in 8 bits")
    say(_sentence(cost_of(path, target, task)))


def _sentence(cost: "Cost") -> str:
    """Return the cost of 8 bits as one line."""
    before, after = cost.before, cost.after
    accuracy = "no images to score"
    if before.accuracy is not None and after.accuracy is not None:
        accuracy = (
            f"accuracy {before.accuracy:.2f} to {after.accuracy:.2f} % ({after.accuracy - before.accuracy:+.2f}) on "
            f"{count_of(cost.images, f'{cost.part} image')}, {cost.agreement:.1f} % in the same class"
        )
    ratio = after.milliseconds / before.milliseconds
    speed = f"{ratio:.1f} times slower" if ratio > 1 else f"{1 / ratio:.1f} times faster"
    return (
        f"float32 to int8: {accuracy}; one image {before.milliseconds:.2f} to {after.milliseconds:.2f} ms ({speed}); "
        f"file {before.size / 1024:.0f} to {after.size / 1024:.0f} KiB"
    )
