"""The drawings of the page: the confusion matrix, and the embedding in two dimensions."""

import pytest
import torch
from torch import nn

from refilled.data import Split, Task
from refilled.models import create_model, licence_of
from refilled.models.timm_backbone import TimmBackbone, timm_model
from refilled.report.matrix import MOST, matrix_of
from refilled.report.measures import confusion_matrix
from refilled.report.projection import projection_of
from refilled.report.text import shortened


def test_the_cells_of_the_matrix_hold_every_image_once():
    generator = torch.Generator().manual_seed(0)
    labels, found = (torch.randint(5, (200,), generator=generator) for _ in range(2))
    drawn = matrix_of(confusion_matrix(found, labels, 5), ["a", "b", "<c>", "d\u202e", "e" * 80])
    counts = {(cell.row, cell.column): cell.count for cell in drawn.cells}
    assert sum(counts.values()) == 200
    for (row, column), count in counts.items():
        assert count == sum(t == row and f == column for t, f in zip(labels.tolist(), found.tolist(), strict=True))
    assert drawn.names[3] == "d\\u202e"
    assert drawn.names[4] == "e" * 24 + "…"
    assert drawn.titles[4] == "e" * 80
    assert all(0 < cell.opacity <= 1 for cell in drawn.cells)


def test_many_classes_have_no_names_on_the_axes():
    assert matrix_of(torch.eye(MOST, dtype=torch.long), list(map(str, range(MOST)))) is not None
    assert matrix_of(torch.eye(MOST + 1, dtype=torch.long), list(map(str, range(MOST + 1)))) is None


def test_wide_letters_take_two_columns():
    assert shortened("文" * 20, 24) == "文" * 12 + "…"


def _split(images: int, classes: int, noise: bool = True) -> tuple[Task, Split]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    pixels = torch.randint(40, (images, 3, 8, 8), generator=generator) if noise else torch.zeros(images, 3, 8, 8)
    pixels = pixels + (200 * labels / classes).long()[:, None, None, None] * noise
    split = Split(pixels.to(torch.uint8), labels, [""] * images)
    return Task("made up", tuple(f"class {n}" for n in range(classes)), split, split, split, 8, "none", ""), split


@pytest.mark.parametrize("classes", [3, 25])
def test_each_image_is_a_dot_within_the_panel_in_the_colour_of_its_class(classes):
    task, split = _split(75, classes)
    drawn = projection_of({"student": create_model("wrn_10_1", classes, image_size=8)}, task, split)
    (groups,) = drawn.panels.values()
    assert [group.name for group in groups] == list(task.classes)
    assert all(len(group.dots) == 75 // classes for group in groups)
    assert len({group.color for group in groups}) == classes
    assert all(0 <= value <= drawn.side for group in groups for dot in group.dots for value in dot)
    assert len(drawn.legend) == (3 if classes == 3 else 0)


def test_a_sentence_replaces_a_picture_that_would_mean_nothing():
    network = create_model("wrn_10_1", 3, image_size=8)
    for images, classes, noise, reason in (
        (6, 3, True, "there are only 6 images"),
        (30, 1, True, "all images are of one class"),
        (30, 3, False, "hardly differs"),
    ):
        drawn = projection_of({"student": network}, *_split(images, classes, noise))
        assert not drawn.panels
        assert reason in drawn.sentence


def test_a_licence_is_that_of_the_weights_that_a_name_stands_for(tmp_path):
    network = TimmBackbone(timm_model("resnet18.a1_in1k"))
    assert licence_of("timm/resnet18.a1_in1k", network) == "apache-2.0"
    assert licence_of("timm/resnet18.a1_in1k:weights.safetensors", network) == "apache-2.0"
    assert licence_of("timm/resnet18:weights.safetensors", network) is None
    assert licence_of("runs/student", network) is None
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\n# A model\n")
    assert licence_of(f"hf:{tmp_path}", nn.Identity()) == "mit"
    assert licence_of("hf:nobody/nothing", nn.Identity()) is None
