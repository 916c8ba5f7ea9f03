"""Image files are classified as a stream: rows come early, nothing is kept, and the output is that of one batch."""

import csv
import io
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from refilled.cli import predictions
from refilled.cli.predictions import CsvRows, JsonRows, TableRows
from refilled.data import streaming
from refilled.errors import TaskError
from refilled.runs.classifying import Classifier, Predicted

CLASSES = ("=1+1", "a\x1b[31m", "third [b]")


def logits(pixels):
    return torch.stack([pixels[:, 0, 0, 0], pixels[:, 1, 0, 0], pixels[:, 2, 0, 0]], 1) / 64


CLASSIFIER = Classifier(logits, CLASSES, 8, None)


@pytest.fixture
def files(tmp_path):
    """Thirty pictures of one colour each, of which every seventh is torn."""
    chance = np.random.default_rng(0)
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for number in range(30):
        file = tmp_path / "photos" / ("inner" if number % 2 else "") / f"{number:02}.png"
        Image.new("RGB", (9, 8), tuple(map(int, chance.integers(0, 256, 3)))).save(file)
        if number % 7 == 3:
            file.write_bytes(b"torn")
    return tmp_path / "photos"


def rows_of(batches):
    batches = list(batches)
    read = [path for batch in batches for path in batch.images]
    torn = [each for batch in batches for each in batch.unreadable]
    return read, torch.cat([batch.probabilities for batch in batches]), torn


def test_the_size_of_batches_does_not_matter(files):
    read, probabilities, torn = rows_of(CLASSIFIER.stream([files], 1000))
    assert len(read) == 26
    assert len(torn) == 4
    assert torch.allclose(probabilities.sum(1), torch.ones(26))
    for size in (1, 4, 30):
        again = rows_of(CLASSIFIER.stream([files], size))
        assert again[0] == read
        assert again[2] == torn
        assert torch.equal(again[1], probabilities)


def test_a_batch_of_torn_files_gives_no_rows(files):
    torn = [path for path in files.rglob("*.png") if path.read_bytes() == b"torn"]
    (batch,) = CLASSIFIER.stream(torn)
    assert (batch.images, batch.probabilities.shape, len(batch.unreadable)) == ([], (0, 3), 4)


def test_at_most_three_batches_are_held_and_no_file_is_looked_at_long_before_its_turn(files, monkeypatch):
    alive, most, decoded = weakref.WeakSet(), 0, 0
    read_pixels = streaming.read_pixels

    def counted(paths, count, size, grey):
        nonlocal most, decoded
        pixels, reasons = read_pixels(paths, count, size, grey)
        alive.add(pixels)
        most, decoded = max(most, len(alive)), decoded + count
        return pixels, reasons

    monkeypatch.setattr(streaming, "read_pixels", counted)
    given = 0
    for batch in streaming.decode_ahead(sorted(files.rglob("*.png")), 8, batch_size=2):
        given += len(batch.images) + len(batch.unreadable)
        assert decoded <= given + 2
    assert given == decoded == 30
    assert most <= 3


def test_a_fault_of_the_listing_comes_after_the_rows_before_it(files):
    def listing():
        yield from sorted(files.glob("*.png"))[:3]
        raise TaskError("cannot be listed")

    batches = streaming.decode_ahead(listing(), 8, batch_size=2)
    assert len(next(batches).images) == 2
    with pytest.raises(TaskError, match="cannot be listed"):
        next(batches)


def test_no_image_and_an_address_are_refused(tmp_path):
    with pytest.raises(TaskError, match="no images were found"):
        list(CLASSIFIER.stream([tmp_path]))
    with pytest.raises(TaskError, match="download what it names"):
        list(CLASSIFIER.stream([tmp_path, Path("https://example.org/a.png")]))


def printed(kind, batches, monkeypatch, *arguments):
    out, err = io.StringIO(newline=""), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(predictions, "err", Console(file=err, width=200))
    if kind is TableRows:
        arguments = (*arguments, Console(file=out, width=60))
    rows = kind(CLASSES, *arguments)
    for batch in batches:
        rows.add(batch)
    rows.close()
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("kind", "arguments"), [(CsvRows, ()), (JsonRows, ()), (TableRows, (2,)), (TableRows, (9,))])
def test_batches_are_printed_as_one_would_be(monkeypatch, kind, arguments):
    names = [Path(f"/some/[red]folder/{number}.png") for number in range(10)]
    shares = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    torn = [(Path("torn\n.png"), "empty")]
    whole = Predicted(names, shares, torn)
    pieces = [Predicted(names[start : start + 4], shares[start : start + 4], []) for start in (0, 4, 8)]
    pieces[-1] = pieces[-1]._replace(unreadable=torn)
    once = printed(kind, [whole], monkeypatch, *arguments)
    assert printed(kind, pieces, monkeypatch, *arguments) == once
    assert once[1] == "skipped torn\\n.png: empty\n"
    lines = once[0].splitlines()
    if kind is CsvRows:
        assert next(csv.reader(lines))[2] == "'=1+1"
        assert len(lines) == 11
    elif kind is JsonRows:
        assert [json.loads(line)["image"] for line in lines] == list(map(str, names))
    else:
        assert "\x1b" not in once[0]
        assert len(lines) == 3 + 10 * min(arguments[0], 3) + 1
        assert len(set(map(len, lines))) == 1  # the frame is straight


FLAT = """
import sys
from pathlib import Path
import torch
from refilled.runs.classifying import Classifier
def memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1000
classifier = Classifier(lambda pixels: torch.zeros(len(pixels), 1000), tuple(map(str, range(1000))), 32, None)
files = [Path(sys.argv[1])]
for count in (500, 4000):
    given = (file for _ in range(count) for file in files)
    rows = sum(len(batch.images) for batch in classifier.stream(given))
    print(rows, memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    run = [sys.executable, "-c", FLAT, str(tmp_path / "a.png")]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    (few, before), (many, after) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (500, 4000)
    assert after - before < 20  # megabytes; the probabilities alone would be 14, as Python's numbers over 100
