"""Commands that train nothing: ``evaluate``, ``predict`` and ``list``."""

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import (
    AsJson,
    DataRoot,
    Folder,
    up_to,
)
from refilled.cli.predictions import CsvRows, JsonRows, TableRows
from refilled.cli.show import console, say
from refilled.errors import RunError, unknown
from refilled.ranges import MOST
from refilled.words import printable


def evaluate(
    folder: Folder,
    task: Annotated[
        str | None,
        typer.Argument(help="Another task with the same classes. Default: the task of the run.", show_default=False),
    ] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a student on the test images of its task or of another task."""
    from refilled.runs.inference import evaluate as score

    result = score(folder, task, data_root)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("class", "accuracy")
    for name, accuracy in result["class_accuracies"].items():
        table.add_row(escape(printable(name)), "no images" if accuracy is None else f"{accuracy:.1f} %")
    table.add_section()
    share = "no images" if result["accuracy"] is None else f"{result['accuracy']:.2f} %"
    table.add_row("the only image" if result["images"] == 1 else f"all {result['images']} images", share)
    if result["balanced_accuracy"] is not None:
        table.add_row("mean over classes", f"{result['balanced_accuracy']:.2f} %")
    console.print(table)
    for note in result["notes"]:
        say(f"note: {printable(note)}")


def predict(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or an exported .onnx file.", show_default=False)
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders with images.", show_default=False)],
    top: Annotated[int, typer.Option(help="Number of classes to print per image.", min=1, callback=up_to(MOST))] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row per image, with all probabilities.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image.")] = False,
) -> None:
    """Predict the class of each image, with its probability."""
    if as_json and as_csv:
        raise RunError("--json and --csv cannot be combined; give one of them")
    if folder.suffix == ".onnx" and not folder.is_dir():
        from refilled.export.onnx_file import open_classifier_file

        classifier = open_classifier_file(folder)
    else:
        from refilled.runs.inference import open_classifier

        classifier = open_classifier(folder)
    rows = CsvRows(classifier.classes) if as_csv else JsonRows(classifier.classes) if as_json else None
    unreadable = 0
    with closing(rows or TableRows(classifier.classes, top)) as output:
        for batch in classifier.stream(images):
            output.add(batch)
            unreadable += len(batch.unreadable)
    if unreadable:
        raise typer.Exit(1)


def list_(
    what: Annotated[
        str, typer.Argument(help="What to list: methods, fewshot, models or datasets.", show_default=False)
    ],
) -> None:
    """List methods, few-shot methods, models or data sets."""
    kinds = {"methods": _methods, "fewshot": _few_shot_methods, "models": _models, "datasets": _datasets}
    if what not in kinds:
        raise RunError(unknown("list", what, kinds))
    console.print(kinds[what]())


def _methods() -> Table:
    from refilled.methods import list_methods, load_method

    table = Table("method", "what it does", "parameters")
    for name in list_methods():
        method = load_method(name)
        table.add_row(name, method.summary, "\n".join(f"{k}={v}" for k, v in method.parameters.items()))
    return table


def _few_shot_methods() -> Table:
    from refilled.fewshot.methods import list_few_shot_methods, load_few_shot_method

    table = Table("few-shot method", "what it does", "parameters")
    for name in list_few_shot_methods():
        method = load_few_shot_method(name)
        table.add_row(name, method.summary, "\n".join(f"{k}={v}" for k, v in method.parameters.items()))
    return table


def _models() -> Table:
    from refilled.models import list_models

    table = Table("model", "what it is")
    for name, description in list_models():
        table.add_row(escape(name), escape(description))
    return table


def _datasets() -> Table:
    from refilled.data import list_datasets

    table = Table("task", "what it is")
    for name, description in list_datasets():
        table.add_row(escape(name), escape(description))
    return table
