"""What each teacher of a run brings: for the terminal, the result and the page."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refilled.models import licence_of
from refilled.runs.prepared import Prepared
from refilled.runs.result import Result
from refilled.training.teacher_cache import fingerprint


def about_teachers(prepared: Prepared) -> dict[str, Any] | None:
    """Return the entry of ``result.json`` for the teacher; None without one.

    For several teachers it is ``name`` (all names), ``ignored`` (whether all are) and ``teachers``, a list with the
    entries of each and its ``label_information`` on a sample of the training images, its ``weight`` (the factor of its
    terms) and the names of its ``terms``.
    """
    found = [_about(prepared, number) for number in range(len(prepared.teachers))]
    if len(found) < 2:
        return found[0] if found else None
    weight = 1 / max(1, len(found) - sum(prepared.ignored))
    for number, about in enumerate(found):
        about["label_information"] = prepared.label_information[number] if prepared.label_information else None
        about["weight"] = 0.0 if prepared.ignored[number] else weight
        about["terms"] = terms_of(prepared, number)
    return {
        "name": ", ".join(prepared.run.teachers),
        "ignored": prepared.ignores_teacher,
        "teachers": found,
    }


def terms_of(prepared: Prepared, number: int) -> list[str]:
    """Return the names of the loss terms that read the outputs of a teacher, in stages that have epochs."""
    terms = (term for stage in prepared.stages if stage.share > 0 for term in stage.terms.items())
    return list(dict.fromkeys(name for name, term in terms if term.teacher is not None and term.of == number))


def brought_by_each(prepared: Prepared) -> Iterator[str]:
    """Yield a line for each of several teachers, for the terminal."""
    about = about_teachers(prepared) or {}
    for number, each in enumerate(about.get("teachers", ()), start=1):
        yield f"teacher {number}: {each['name']}, {in_words(each)}"


def in_words(about: Mapping[str, Any]) -> str:
    """Return what one of several teachers brings."""
    known = about["label_information"]
    information = "label information unknown (too few images)" if known is None else f"label information {known:.2f}"
    if about["ignored"]:
        return f"{information}, ignored"
    return f"{information}, width {about['embedding_dim']}, weight {about['weight']:.2f}: {', '.join(about['terms'])}"


def with_gap(result: Result, number: int, gap: Mapping[str, Any]) -> Result:
    """Return the result with the gap between the cache of a teacher and the live teacher.

    Of several teachers, the gap of the teacher that lost most also stands where that of a single one would.
    """
    about = dict(result.teacher or {})
    if "teachers" in about:
        about["teachers"] = [
            {**each, "cache": dict(gap)} if place == number else each for place, each in enumerate(about["teachers"])
        ]
    worst = about.get("cache")
    if (
        worst is None
        or gap["live_accuracy"] - gap["cached_accuracy"] > worst["live_accuracy"] - worst["cached_accuracy"]
    ):
        about["cache"] = dict(gap)
    return replace(result, teacher=about)


def _about(prepared: Prepared, number: int) -> dict[str, Any]:
    teacher = prepared.teachers[number]
    return {
        "name": prepared.run.teachers[number],
        "ignored": prepared.ignored[number],
        "fingerprint": fingerprint(teacher),
        "image_size": teacher.input_size or prepared.task.image_size,
        "embedding": teacher.pooling,
        "embedding_dim": teacher.embedding_dim,
        "licence": licence_of(prepared.run.teachers[number], teacher),
    }
