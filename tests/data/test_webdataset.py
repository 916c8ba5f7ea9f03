"""WebDataset shards: what is in them is found, and what hostile ones ask for is not done."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import drawn
from refilled.data import load_task
from refilled.data.decode import read_pixels
from refilled.data.sources.webdataset import open_webdataset
from refilled.errors import RefilledError, TaskError


def png(number: int) -> bytes:
    return drawn.png(drawn.numbered(number))


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(numbers: range, classes: int = 2, image: str = "png") -> list[tuple[str, bytes]]:
    return [
        pair
        for n in numbers
        for pair in ((f"images/{n:04}.{image}", png(n)), (f"images/{n:04}.cls", str(n % classes).encode()))
    ]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_are_read_where_they_lie(tmp_path, form):
    for shard in range(3):
        write_tar(tmp_path / f"train-{shard}.tar", samples(range(10 * shard, 10 * shard + 10)), form)
    write_tar(tmp_path / "val-0.tar", samples(range(30, 34)), form)
    write_tar(tmp_path / "test-0.tar", samples(range(40, 46)), form)
    task = load_task(f"wds:{tmp_path}")
    assert (task.classes, task.image_size) == (("0", "1"), 8)
    assert task.train.pixels[:, 0, 0, 0].tolist() == list(range(30))
    assert task.train.labels.tolist() == [n % 2 for n in range(30)]
    assert task.val.pixels[:, 0, 0, 0].tolist() == list(range(30, 34))
    assert task.test.sources == tuple(f"test-0.tar#{n}" for n in range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{p}-0.tar" for p in ("test", "train")),
        "train-1.tar", "train-2.tar", "val-0.tar"]  # fmt: skip
    again = load_task(task.name)
    assert again.fingerprint == task.fingerprint


def test_the_same_images_as_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    for n in range(40):
        path = tmp_path / "folder" / str(n % 2) / f"{n:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    (tmp_path / "shards").mkdir()
    for label in range(2):
        every = range(label, 40, 2)
        members = [pair for n in every for pair in ((f"{n:04}.png", png(n)), (f"{n:04}.cls", b"%d" % label))]
        write_tar(tmp_path / "shards" / f"shard-{label}.tar", members)
    folder = load_task("folder", data_root=tmp_path)
    for limit in (2**30, 0):
        shards = load_task("wds:shards@seed=0", data_root=tmp_path, memory_limit=limit)
        assert shards.name == "wds:shards"
        assert shards.fingerprint == folder.fingerprint


def test_classes_may_be_named_and_endings_chosen(tmp_path):
    members = [
        pair
        for n in range(20)
        for pair in ((f"{n}.left.jpg", b"no"), (f"{n}.right.png", png(n)), (f"{n}.name", ["é", "b"][n % 2].encode()))
    ]
    file = write_tar(tmp_path / "all.tar", members)
    with pytest.raises(TaskError, match=r"'left\.jpg', 'right\.png', 'name'; add @image="):
        load_task(f"wds:{file}")
    task = load_task(f"wds:{file}@image=right.png,label=name")
    assert task.classes == ("b", "é")
    assert len(task.train) + len(task.val) + len(task.test) == 20


def test_a_hostile_shard_does_nothing(tmp_path):
    """Names that lead outside, links, devices, sparse files and sizes that lie."""
    canary = tmp_path / "canary"
    canary.write_bytes(png(99))
    file = tmp_path / "home" / "train-0.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as archive:
        for n, name in enumerate(["../../escape", "/etc/absolute", "a\x1b[31m\nb", "é" * 200, "C:\\x", "..", "x/../y"]):
            for ending, content in (("png", png(n)), ("cls", b"%d" % (n % 2))):
                member = tarfile.TarInfo(f"{name}{n}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.png")
            member.type, member.linkname = kind, str(canary)
            archive.addfile(member)
    part = open_webdataset(file).train
    pixels, reasons = read_pixels(part.pictures(np.arange(len(part.labels))), len(part.labels), 8)
    assert reasons == {}
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6]  # what begins with a dot is hidden
    assert [part.name(row) for row in range(6)] == [f"train-0.tar#{row}" for row in range(6)]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["canary", "home", "train-0.tar"]


def test_bad_images_are_listed_by_shard_and_number(tmp_path):
    members = samples(range(12))
    members[2] = ("images/0001.png", b"no picture")
    del members[4]  # the image of number 2
    file = write_tar(tmp_path / "train.tar", members)
    part = open_webdataset(file).train
    _, reasons = read_pixels(part.pictures(np.arange(12)), 12, 8)
    assert sorted(reasons) == [1, 2]
    assert reasons[2] == "empty"


@pytest.mark.parametrize("harm", ["cut", "header", "label missing", "label huge", "empty", "not a tar", "compressed"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    file = write_tar(tmp_path / "train-7.tar", samples(range(10)))
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:3000])
    elif harm == "header":  # of the third member
        at = content.index(b"images/0001.png")
        file.write_bytes(content[:at] + b"\xff" * 300 + content[at + 300 :])
    elif harm == "label missing":
        write_tar(file, [*samples(range(3)), ("images/9.png", png(1))])
    elif harm == "label huge":
        write_tar(file, [("1.png", png(1)), ("1.cls", b"1" * 5000)])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "not a tar":
        file.write_bytes(os.urandom(4096))
    else:
        with tarfile.open(file, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(TaskError, match=r"train-7\.tar"):
        load_task(f"wds:{tmp_path}")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 10000))
def test_fuzzed_shards_raise_only_user_errors(tmp_path_factory, noise, at):
    file = tmp_path_factory.mktemp("fuzz") / "train.tar"
    content = write_tar(file, samples(range(6))).read_bytes()
    file.write_bytes(content[:at] + noise + content[at + len(noise) :])
    try:
        part = open_webdataset(file).train
        read_pixels(part.pictures(np.arange(len(part.labels))), len(part.labels), 4)
    except RefilledError:
        pass


def test_many_names_in_a_row_do_not_exhaust_the_stack(tmp_path):
    """A long name is a member before the member; thousands of them before one would recurse for each."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    (tmp_path / "train.tar").write_bytes(block * 5000 + b"\0" * 1024)
    with pytest.raises(TaskError, match="cannot be read as a tar file"):
        open_webdataset(tmp_path / "train.tar")


def test_a_folder_without_shards_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(TaskError, match="has no tar files"):
        open_webdataset(tmp_path)
    with pytest.raises(TaskError, match="there is no folder or file"):
        load_task(f"wds:{tmp_path}/nowhere")


def test_the_training_part_is_needed(tmp_path):
    write_tar(tmp_path / "test-0.tar", samples(range(4)))
    with pytest.raises(TaskError, match="no training part"):
        open_webdataset(tmp_path)


def test_shards_of_unclear_parts_are_refused_and_one_shard_is_a_task(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(range(20)))
    write_tar(tmp_path / "more-0.tar", samples(range(20, 40)))
    with pytest.raises(TaskError, match=r"more-0\.tar belongs to no part"):
        load_task(f"wds:{tmp_path}")
    (tmp_path / "more-0.tar").rename(tmp_path / "val-0.tar")
    write_tar(tmp_path / "dev-0.tar", samples(range(40, 60)))
    with pytest.raises(TaskError, match="two kinds of files for the val part, 'dev' and 'val'"):
        load_task(f"wds:{tmp_path}")
    assert len(load_task(f"wds:{tmp_path / 'val-0.tar'}").classes) == 2


def test_a_label_that_numbers_the_images_is_refused(tmp_path):
    members = [pair for n in range(9) for pair in ((f"{n}.png", png(n)), (f"{n}.cls", b"%d" % n))]
    with pytest.raises(TaskError, match="its 9 rows all hold different values"):
        load_task(f"wds:{write_tar(tmp_path / 'train-0.tar', members)}")
