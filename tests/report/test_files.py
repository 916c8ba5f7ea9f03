"""What the report says of files that are not used, of unreadable images, and of copies."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from drawn import folder
from refilled.cli.app import app
from refilled.data.several import Several


@pytest.mark.slow
def test_each_kind_has_a_line_with_its_number_and_first_names(tmp_path):
    root = folder(tmp_path / "photos", {"cat": 60, "dog": 60}, size=8)
    for index in range(7):
        (root / "cat" / f"note{index}.txt").write_text("a note")
    (root / "dog" / "<b>.psd").write_bytes(b"8BPS")
    (root / "dog" / ".hidden.txt").write_text("hidden")
    (root / "beside.png").write_bytes((root / "dog" / "00.png").read_bytes())
    (root / "dog" / "torn.png").write_bytes((root / "dog" / "00.png").read_bytes()[:60])
    shutil.copy(root / "dog" / "01.png", root / "dog" / "01 copy.png")
    words = ["train", root, "--epochs", 1, "--threads", 1, "--quiet", "--model", "wrn_10_1", "--out", tmp_path / "run"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    data = json.loads((tmp_path / "run" / "result.json").read_text())["data"]
    assert data["ignored"] == {"count": 9, "first": ["beside.png", *(f"cat/note{n}.txt" for n in range(4))]}
    assert data["copies"]["count"] == 1
    assert data["left_out"]["count"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>files that are not used</td><td>9</td><td>beside.png, cat/note0.txt" in page
    assert "cat/note3.txt and 4 more</td>" in page
    assert "<td>images that cannot be read</td><td>1</td><td>dog/torn.png (" in page
    assert "<td>copies of other images, kept in the same part</td><td>1</td><td>dog/01" in page
    assert "equal held-out ones" not in page


def test_several_keep_the_first_names_and_the_number():
    assert str(Several.of(range(7)) + Several.of("ab")) == "0, 1, 2, 3, 4 and 4 more"
    assert str(Several.of("ab")) == "a, b"
    assert Several.of([]).count == 0
