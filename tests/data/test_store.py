"""Images on disk: they are those that would be in memory, whatever happened while they were written."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drawn import folder
from refilled.config import Run
from refilled.data import channel_statistics, load_task, store
from refilled.data.source import ArrayPart, Names
from refilled.data.store import JoinedImages, StoredImages, free_memory, gathered, stored_images
from refilled.errors import TaskError
from refilled.runs.experiment import distill

SIDE = 8


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch) -> Path:
    """Shards of five images of 8 x 8, in a cache that no other test uses; returns their folder."""
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHARD_BYTES", 5 * 3 * SIDE**2)
    return tmp_path / "cache" / "images"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of 30 pictures, some of them unreadable or equal."""
    root = folder(tmp_path / "photos", dict.fromkeys("abc", 30), size=(10, 9))
    (root / "a" / "07.png").write_bytes(b"no picture")
    (root / "c" / "29.png").write_bytes((root / "b" / "03.png").read_bytes())
    return root


@pytest.fixture
def part() -> ArrayPart:
    pixels = np.random.default_rng(0).integers(0, 256, (23, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayPart(np.arange(23) % 2, pixels, "made")


def count_decoded(monkeypatch) -> list[int]:
    """Keep the number of pictures of every shard that is decoded from now on."""
    counts, read = [], store.read_pixels

    def counted(pictures, count, size, grey=None):
        counts.append(count)
        return read(pictures, count, size, grey)

    monkeypatch.setattr(store, "read_pixels", counted)
    return counts


def whole(images: StoredImages) -> torch.Tensor:
    return images[torch.arange(len(images))]


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*/images.u8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("text", ["photos", "photos:a,c@shots=9,seed=3", "photos@val=0,test=0.5"])
def test_a_task_on_disk_is_the_task_in_memory(photos, text):
    arguments = {"data_root": photos.parent, "image_size": SIDE, "allow_bad": True}
    memory, disk = (load_task(text, **arguments, memory_limit=limit) for limit in (2**30, 0))
    assert isinstance(disk.train.pixels, StoredImages)
    assert disk.fingerprint == memory.fingerprint
    assert (disk.name, disk.classes, disk.skipped, disk.notes) == (
        memory.name, memory.classes, memory.skipped, memory.notes,
    )  # fmt: skip
    for ours, theirs in zip((disk.train, disk.val, disk.test), (memory.train, memory.val, memory.test), strict=True):
        assert ours.sources == theirs.sources
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(whole(ours.pixels), theirs.pixels)
    assert channel_statistics(disk.train.pixels) == channel_statistics(memory.train.pixels)


@pytest.mark.slow
def test_training_from_disk_gives_the_same_bits(tmp_path):
    run = Run(task="digits:0-4", student="wrn_10_1", epochs=2, shots=12, batch_size=16, threads=1, device="cpu")
    digests = []
    for memory in (None, 0.0):
        folder = tmp_path / str(memory)
        result = distill(replace(run, image_memory=memory), folder)
        files = [(folder / name).read_bytes() for name in ("model.safetensors", "log.jsonl")]
        digests.append((sha256(b"".join(files)).hexdigest(), result.accuracy, result.data["fingerprint"]))
    assert digests[0] == digests[1]
    assert (tmp_path / "cache" / "images").exists()


@given(st.lists(st.integers(-23, 22), max_size=40), st.integers(1, 30), st.slices(23))
def test_stored_images_behave_as_a_tensor_does(indices, size, some):
    tensor = torch.randint(256, (23, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if some.step is not None and some.step < 0:
        some = slice(some.start, some.stop)
    shuffled = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    images = StoredImages(tensor[shuffled.argsort()].permute(0, 2, 3, 1).contiguous(), shuffled)
    assert images.shape == tensor.shape
    assert len(images) == len(tensor)
    index = torch.tensor(indices, dtype=torch.int64)
    assert torch.equal(images[index], tensor[index])
    assert torch.equal(images.index_select(0, index % 23), tensor.index_select(0, index % 23))
    assert torch.equal(whole(images[some]), tensor[some])
    assert torch.equal(images[3], tensor[3])
    blocks = list(images.split(size))
    assert [len(block) for block in blocks] == [len(block) for block in tensor.split(size)]
    assert torch.equal(torch.cat(blocks), tensor)
    wanted = np.isin(np.arange(23), indices)
    assert torch.equal(whole(images.keep(wanted)), tensor[torch.from_numpy(wanted)])
    assert images.index_select(0, index % 23).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathered_images_are_the_same_and_channels_last_wherever_they_come_from(layout):
    pixels = torch.randint(256, (9, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels.contiguous(memory_format=layout)
    stored = StoredImages(pixels.permute(0, 2, 3, 1).contiguous(), torch.arange(9))
    sources = [pixels, stored, JoinedImages(pixels[:4], pixels[4:]), JoinedImages(stored[:4], pixels[4:])]
    for index in (torch.tensor([8, 0, 4, 4, 3]), torch.tensor([7, 5])):
        for source in sources:
            found = gathered(source, index)
            assert torch.equal(found, pixels[index])
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_only_what_is_missing_is_decoded(part, monkeypatch):
    counts = count_decoded(monkeypatch)
    stored_images(part, np.array([6, 7, 12]), SIDE)
    assert counts == [5, 5]
    stored_images(part, np.array([0, 7, 22]), SIDE)
    assert counts == [5, 5, 5, 3]
    everything = stored_images(part, np.arange(23), SIDE)
    assert counts == [5, 5, 5, 3, 5]
    assert np.array_equal(whole(everything.images).permute(0, 2, 3, 1).numpy(), part.pixels)


def test_an_interrupted_start_loses_at_most_one_shard(part, monkeypatch):
    write, written = store.write_atomic, []

    def interrupted(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomic", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored_images(part, np.arange(23), SIDE)
    counts = count_decoded(monkeypatch)
    again = stored_images(part, np.arange(23), SIDE)
    assert counts == [5, 5, 3]
    assert np.array_equal(whole(again.images).permute(0, 2, 3, 1).numpy(), part.pixels)


def flip_a_bit(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("at", [0, 5 * 192, 23 * 192 - 1])
def test_a_damaged_image_is_found_and_its_shard_made_again(part, monkeypatch, small_shards, at):
    stored_images(part, np.arange(23), SIDE)
    flip_a_bit(file_of(small_shards), at)
    counts = count_decoded(monkeypatch)
    again = stored_images(part, np.arange(23), SIDE)
    assert len(counts) == 1
    assert np.array_equal(whole(again.images).permute(0, 2, 3, 1).numpy(), part.pixels)


@pytest.mark.parametrize("harm", ["cut the images", "cut a record", "spoil a record", "remove the images"])
def test_whatever_is_damaged_is_written_again(part, small_shards, harm):
    stored_images(part, np.arange(23), SIDE)
    file = file_of(small_shards)
    record = file.with_name("000001.shard")
    {
        "cut the images": lambda: os.truncate(file, 1000),
        "cut a record": lambda: os.truncate(record, 30),
        "spoil a record": lambda: record.write_bytes(b"\xff" * 100),
        "remove the images": file.unlink,
    }[harm]()
    again = stored_images(part, np.arange(23), SIDE)
    assert np.array_equal(whole(again.images).permute(0, 2, 3, 1).numpy(), part.pixels)


def test_a_disk_that_loses_what_was_written_is_noticed(part, monkeypatch):
    monkeypatch.setattr(np.memmap, "__setitem__", lambda self, key, value: None)
    with pytest.raises(TaskError, match="does not hold what was written"):
        stored_images(part, np.arange(23), SIDE)


def test_a_full_disk_is_reported_with_the_bytes_needed(part, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TaskError, match=r"no space left on device.*0\.0 GiB.*REFILLED_CACHE"):
        stored_images(part, np.arange(23), SIDE)


@pytest.mark.slow
def test_a_changed_picture_is_noticed(photos):
    arguments = {"data_root": photos.parent, "image_size": SIDE, "allow_bad": True, "memory_limit": 0}
    before = load_task("photos", **arguments)
    Image.new("RGB", (10, 10), "red").save(photos / "b" / "00.png")
    after = load_task("photos", **arguments)
    assert after.fingerprint != before.fingerprint
    assert after.fingerprint == load_task("photos", **{**arguments, "memory_limit": 2**30}).fingerprint


@dataclass(frozen=True)
class DeadlyPart(ArrayPart):
    """Kills any process that reads it, but for the one that began."""

    def pictures(self, rows):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pictures(rows)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(part, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    deadly = DeadlyPart(part.labels, part.pixels, part.prefix)
    found = stored_images(deadly, np.arange(23), SIDE)
    assert np.array_equal(whole(found.images).permute(0, 2, 3, 1).numpy(), part.pixels)


@pytest.mark.slow
def test_several_processes_share_the_work(photos, tmp_path):
    """Each shard is decoded by one of them, and all of them have the same images in the end."""
    (tmp_path / "share.py").write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from refilled.data import load_task, store\n"
        f"store._SHARD_BYTES = {5 * 3 * SIDE**2}\n"
        "decode = store._Store._decode\n"
        "def noted(self, shard):\n"
        "    with Path('decoded').open('a') as file: file.write(f'{self.folder.name}/{shard}\\n')\n"
        "    time.sleep(0.02)\n"
        "    decode(self, shard)\n"
        "store._Store._decode = noted\n"
        f"task = load_task('photos', data_root=Path('.'), image_size={SIDE}, allow_bad=True, memory_limit=0)\n"
        "print(task.fingerprint)\n"
    )
    command = [sys.executable, "-W", "error", "share.py"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    fingerprints = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(fingerprints) == 1
    decoded = (tmp_path / "decoded").read_text().split()
    assert sorted(decoded) == sorted(set(decoded))
    assert len(decoded) == 18  # 90 pictures


def test_names_are_a_sequence_like_any_other(part):
    names = Names(part, np.array([3, 5, 8]))
    assert list(names) == ["made#3", "made#5", "made#8"]
    assert names == ("made#3", "made#5", "made#8")
    assert (names[-1], names[1:]) == ("made#8", ("made#5", "made#8"))
    assert json.dumps(list(names))


def test_free_memory_is_less_than_there_is():
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
