"""Counts and their nouns."""

import pytest
import torch

from refilled.data import Split
from refilled.report.labels import summary
from refilled.report.projection import projection_of
from refilled.report.speed import Speed
from refilled.words import count_of, plural


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (1, ("seed",), "1 seed"),
        (0, ("seed",), "0 seeds"),
        (2, ("process",), "2 processes"),
        (1, ("class",), "1 class"),
        (2, ("query", "queries"), "2 queries"),
        (1, ("image is", "images are"), "1 image is"),
        (3, ("image is", "images are"), "3 images are"),
    ],
)
def test_a_noun_has_the_number_of_its_count(number, words, expected):
    assert count_of(number, *words) == expected
    assert expected == f"{number} {plural(number, *words)}"


class _Group:
    across, disagree = True, False


class _Findings:
    def __init__(self, count: int) -> None:
        self.doubts, self.groups, self.judged, self.agreement = [0] * count, [_Group()] * count, count, None


def test_the_summary_of_labels_counts_one():
    assert summary(_Findings(1)) == [
        "1 of 1 label is doubtful.",
        "1 group of near copies, 1 across parts, 0 with different labels.",
    ]
    assert summary(_Findings(2)) == [
        "2 of 2 labels are doubtful.",
        "2 groups of near copies, 2 across parts, 0 with different labels.",
    ]


def test_the_page_counts_one():
    def with_images(count: int) -> str:
        images = Split(
            torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.zeros(count, dtype=torch.long), [""] * count
        )
        return projection_of({}, None, images).sentence

    assert with_images(1).endswith("there is only 1 image.")
    assert with_images(2).endswith("there are only 2 images.")
    cost = Speed(1, None, {1: 2.0}, 8, "cpu", 1)
    assert "1 thread, float32" in cost.rows()[-1][1]
    assert cost.rows()[-1][0] == "time per image, batch of 1"
    assert Speed(1, None, {}, 8, "cpu", 1).rows()[-1] == [
        "time per image",
        "not measured, since other runs were under way",
    ]
