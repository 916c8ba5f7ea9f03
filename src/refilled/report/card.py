"""The model card of a run: ``README.md`` with metadata for the Hugging Face hub."""

import json
import re
from typing import Any

from refilled.config import Run
from refilled.runs.result import Result
from refilled.words import count_of

_SHOWN = 20  # names of classes


def markdown(text: str) -> str:
    """Escape any text so that Markdown shows it verbatim, on one line."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$<>&:@^=-])", lambda found: f"&#{ord(found[0])};", visible)
    return escaped or "&nbsp;"


def model_card(run: Run, result: Result, licence: str | None, ece: float | None) -> str:
    """Return the card as Markdown.

    Args:
        run: The run.
        result: Its result.
        licence: Licence of the teacher's weights, if known.
        ece: Expected calibration error in [0, 1], if measured.
    """
    metadata: dict[str, Any] = {
        "library_name": "refilled",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "refilled"],
        "metrics": ["accuracy"],
    }
    if run.task.startswith("hf:"):
        metadata["datasets"] = [re.split("[:@]", run.task[3:])[0]]
    front = "".join(f"{name}: {json.dumps(value)}\n" for name, value in metadata.items())
    names = list(result.class_accuracies)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    figures = {
        "accuracy": _percent(result.accuracy),
        "balanced accuracy": _percent(result.balanced_accuracy),
        "nearest class mean": _percent(result.ncm_accuracy),
        "expected calibration error": "unknown" if ece is None else f"{ece:.3f}",
        "parameters": f"{result.parameters:,}",
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures.items())
    part = result.data.get("scored", "test")
    about = result.teacher or {}
    names_of_teachers = [each["name"] for each in about.get("teachers", [about] if about else [])]
    teacher = ", ".join(markdown(_last(name)) for name in names_of_teachers)
    return (
        f"---\n{front}---\n\n# {markdown(run.student or 'teacher')} for {len(names)} classes\n\n"
        f"Trained with [refilled](https://pypi.org/project/refilled/) by the method {markdown(run.method)}"
        f"{f', teacher {teacher}' if teacher else ', without a teacher'}."
        f"{f' Licence of the teacher: {markdown(licence)}.' if licence else ''}\n\n"
        f"Classes: {', '.join(markdown(name[:80]) for name in names[:_SHOWN])}{more}.\n\n"
        f"| figure, on {count_of(result.data['images'][part], f'{part} image')} | |\n|---|---|\n{rows}\n"
        f"Images: {markdown(_last(run.task))}, {result.data['images']['train']} for training, "
        f"{result.data['image_size']} pixels; fingerprint `{result.data['fingerprint'][:16]}`. Seed {run.seed}.\n"
    )


def _last(path: str) -> str:
    """Return the last part of a path, because a card must not name folders of this machine."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", ".", "~")) else path


def _percent(value: float | None) -> str:
    return "unknown" if value is None or value != value else f"{value:.2f} %"
