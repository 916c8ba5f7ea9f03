"""Tables of embeddings, through the command line, compared with the model's own output."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.data.decode import decode
from refilled.errors import RefilledError
from refilled.models import create_model, load_model, load_teacher, save_model
from refilled.runs.embedding import open_network, write_embeddings

FILE = """
import torch
from torch import nn

class Mean(nn.Module):
    def forward_features(self, images):
        return images.mean((2, 3))

def make():
    return Mean()
"""


def refilled(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def read(file) -> dict[str, np.ndarray]:
    """Read a table in any of the formats to arrays, embeddings as (N, d)."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        return {name: np.array(table[name].to_pylist()) for name in table.column_names}
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    numbers = [[np.float32(value) for name, value in row.items() if name[0] == "e"] for row in rows]
    return {
        "image": np.array([row["image"] for row in rows]),
        "embedding": np.array(numbers),
        "class": np.array([row["class"] for row in rows]),
        "probability": np.array([float(row["probability"]) for row in rows]),
    }


def by_hand(model, paths) -> torch.Tensor:
    """Embed files one at a time, without batches or tables."""
    with torch.no_grad():
        images = [torch.from_numpy(decode(path, model.image_size).copy()).permute(2, 0, 1)[None] for path in paths]
        return torch.cat([model(image).embedding for image in images])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".npz"])
def test_a_table_holds_what_the_student_gives_for_each_file(suffix, teacher, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("refilled.runs.embedding._BATCH", 7)
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    out = tmp_path / "new" / f"table{suffix}"
    shown = refilled("embed", teacher, photos / "c01", torn, photos / "c02", "--out", out, code=1)
    assert "torn.png: not a picture" in shown
    assert "24 embeddings of 64 numbers" in shown
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    table, model = read(out), load_model(Path(teacher))
    paths = sorted((photos / "c01").iterdir()) + sorted((photos / "c02").iterdir())
    assert table["image"].tolist() == list(map(str, paths))
    assert table["embedding"].shape == (24, 64)
    torch.testing.assert_close(torch.tensor(table["embedding"]).float(), by_hand(model, paths), rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in refilled("predict", teacher, *paths, "--json").splitlines()]
    assert table["class"].tolist() == [row["class"] for row in rows]
    highest = [max(row["probabilities"].values()) for row in rows]
    assert table["probability"] == pytest.approx(highest, abs=1e-5)


def test_teachers_of_all_kinds_embed(photos, tmp_path):
    model = create_model("wrn_10_1", 5, image_size=16)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    (tmp_path / "mine.py").write_text(FILE)
    given = ["--teacher-mean", 0.5, 0.5, 0.5, "--teacher-std", 0.25, 0.25, 0.25, "--image-size", 16]
    mean = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    for name, arguments in {
        f"wrn_10_1:{tmp_path / 'w.pth'}": given,
        f"{tmp_path / 'mine.py'}:make": given,
        "refilled/letters": [],
    }.items():
        out = tmp_path / "t.parquet"
        refilled("embed", name, photos / "c03", "--out", out, "--overwrite", *arguments)
        oracle = load_teacher(name, **(mean if arguments else {}), image_size=16)
        oracle.image_size = 16 if arguments else oracle.image_size
        table = read(out)
        expected = by_hand(oracle, sorted((photos / "c03").iterdir()))
        torch.testing.assert_close(torch.tensor(table["embedding"]).float(), expected, rtol=1e-4, atol=1e-5)
        assert ("class" in table) == (oracle.class_names is not None)


def test_a_name_that_is_not_utf8_and_a_class_like_a_formula_are_written(tmp_path):
    model = create_model("wrn_10_1", 1, image_size=16)
    model.class_names = ("=cmd()",)
    save_model(model, tmp_path / "student")
    picture = tmp_path / "b\udcff.png"
    Image.new("RGB", (9, 9)).save(picture)
    for suffix in (".parquet", ".npz", ".csv"):
        file = tmp_path / f"t{suffix}"
        write_embeddings(open_network(str(tmp_path / "student")), [picture], file)
        table = read(file)
        assert table["image"][0].endswith("b\\udcff.png")
        assert table["class"].tolist() == ["'=cmd()" if suffix == ".csv" else "=cmd()"]


@pytest.mark.parametrize(
    ("model", "images", "out", "hint"),
    [
        ("{teacher}", "{photos}", "t.txt", "must end in one of .parquet, .csv, .npz"),
        ("{teacher}", "{photos}", "there.csv", "exists; choose another --out"),
        ("{teacher}", "empty", "t.csv", "no images were found"),
        ("{teacher}", "https://example.org/a.png", "t.csv", "is not a file; download"),
        ("{teacher}x", "{photos}", "t.csv", "there is no such file or folder; a teacher is"),
        ("timm/resnet5O", "{photos}", "t.csv", "did you mean timm/resnet50"),
        ("mine.py:make", "{photos}", "t.csv", "give it in pixels with --image-size"),
    ],
)
def test_a_mistake_gets_an_explanation_and_leaves_no_file(
    teacher, photos, tmp_path, monkeypatch, model, images, out, hint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "mine.py").write_text(FILE)
    before = sorted(tmp_path.iterdir())
    mean = ["--teacher-mean", 0.5, 0.5, 0.5, "--teacher-std", 0.5, 0.5, 0.5] if "mine" in model else []
    with pytest.raises(RefilledError) as caught:
        refilled("embed", model.format(teacher=teacher), images.format(photos=photos), "--out", out, *mean)
    assert hint in str(caught.value)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before
    assert (tmp_path / "there.csv").read_text() == "mine"
