"""The embedded letters: the same on every call, no digit among them, and a cache that cannot do harm."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from refilled.data import load_task
from refilled.data.sources import letters

OPEN = "from refilled.data import load_task; print(load_task('letters').fingerprint)"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(cache))


def files_of(cache: Path) -> list[Path]:
    return list((cache / "letters").iterdir())


@pytest.mark.slow
def test_two_processes_that_draw_at_once_and_one_that_reads_get_the_same_images(tmp_path):
    environment = {**os.environ, "REFILLED_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", OPEN]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=300)[0].strip() for process in processes)
    assert len(files_of(tmp_path)) == 1  # and nothing half written beside it
    assert first == second == load_task("letters").fingerprint
    assert len(first) == 64


@pytest.mark.slow
def test_a_damaged_cache_is_drawn_again(cache):
    before = load_task("letters").fingerprint
    (file,) = files_of(cache)
    whole = file.read_bytes()
    for damaged in (whole[:1000], b"", bytes([whole[0] ^ 1]) + whole[1:]):
        file.write_bytes(damaged)
        assert letters._drawn_once().tobytes() == whole[:-32]
        assert file.read_bytes() == whole
    assert load_task("letters").fingerprint == before


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(letters, "_draw_all", lambda: np.zeros((128, 80, 8, 8), dtype=np.uint8))
    assert len(letters.open_letters().classes) == 128


@pytest.mark.slow
def test_there_are_128_letters_and_no_digit():
    task = load_task("letters", val=0.0)
    assert len(task.classes) == len(set(task.classes)) == 128
    assert all(unicodedata.category(letter).startswith("L") for letter in letters.LETTERS)
    assert (len(task.train), len(task.test)) == (128 * 70, 128 * 10)


def test_no_letter_looks_exactly_like_another_or_like_a_digit():
    font = ImageFont.truetype(str(letters._font_file("DejaVuSans")), 40)
    printed = [letters._print(letter, font).tobytes() for letter in (*letters.LETTERS, *"0123456789")]
    assert len(set(printed)) == len(printed)
    assert not set(letters.LETTERS) & set("OoIlZSsqbgBzΟοОоΒΖΙВЗзбЧчЄэ")


def test_an_image_shows_a_light_letter_on_black_that_differs_from_image_to_image():
    pixels = letters._drawn_once()
    assert pixels.reshape(-1, 64).max(1).min() > 100
    assert pixels[:, :, 0, 0].mean() < pixels.mean()
    assert len(np.unique(pixels.reshape(-1, 64), axis=0)) > 0.99 * 128 * 80
