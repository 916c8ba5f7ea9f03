"""Folders of images and how they are divided: good ones, bad splits, bad files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import drawn
from drawn import numbered
from refilled.data import Split, Task, epoch_batches, load_task
from refilled.data.partition import draw_shots, hold_out, hold_out_by_content
from refilled.errors import TaskError


def put(path: Path, number: int, size: tuple[int, int] = (8, 8)) -> None:
    """Write a picture of its own colour; equal numbers give equal pictures."""
    drawn.put(path, numbered(number, size))


def fill(root: Path, counts: dict[str, int], first_colour: int = 0) -> Path:
    """Write this many different pictures into each class folder."""
    colour = first_colour
    for name, count in counts.items():
        for number in range(count):
            put(root / name / f"{number:03}.png", colour)
            colour += 1
    return root


def pictures(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.pixels}


def per_class(task: Task, split: Split) -> dict[str, int]:
    counts = np.bincount(split.labels.numpy(), minlength=len(task.classes)).tolist()
    return dict(zip(task.classes, counts, strict=True))


def test_class_folders_become_a_task(tmp_path):
    task = load_task(str(fill(tmp_path, {"dog": 10, "cat": 20})))
    assert task.classes == ("cat", "dog")
    for split in (task.train, task.val, task.test):
        assert min(per_class(task, split).values()) >= 1
    assert task.image_size == 8
    assert task.train.sources[0].startswith("cat/")
    everything = [*task.train.sources, *task.val.sources, *task.test.sources]
    assert len(set(everything)) == 30
    assert "no test part" in task.notes[0]


def test_each_image_lies_under_its_own_class_and_name(tmp_path):
    task = load_task(str(fill(tmp_path, {"cat": 5, "dog": 5})), val=0)
    for split in (task.train, task.test):
        for image, label, source in zip(split.pixels, split.labels, split.sources, strict=True):
            colour = np.asarray(Image.open(tmp_path / source))[0, 0]
            assert image[:, 0, 0].tolist() == colour.tolist()
            assert task.classes[label] == Path(source).parent.name


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_part_folders_are_taken_as_they_are(tmp_path, val_name):
    fill(tmp_path / "train", {"cat": 6, "dog": 6})
    fill(tmp_path / val_name, {"cat": 2, "dog": 2}, 100)
    fill(tmp_path / "test", {"cat": 3, "dog": 3}, 200)
    task = load_task(f"folder:{tmp_path}")
    assert [len(split) for split in (task.train, task.val, task.test)] == [12, 4, 6]
    assert task.notes == ()
    assert len(load_task(f"folder:{tmp_path}", val=0).val) == 0


def test_a_class_may_be_called_train(tmp_path):
    assert load_task(str(fill(tmp_path, {"bus": 5, "train": 5}))).classes == ("bus", "train")


def test_names_may_hold_colons_spaces_and_any_letters(tmp_path):
    root = fill(tmp_path / "my photos: été 鳥", {"a b": 4, "c:d": 4, "<b>é": 4})
    task = load_task(f"{root}:c:d,<b>é")
    assert task.classes == ("<b>é", "c:d")
    assert load_task(task.name).fingerprint == task.fingerprint


def test_pictures_may_lie_deeper_and_other_files_are_skipped(tmp_path):
    fill(tmp_path, {"cat": 3, "dog": 3})
    put(tmp_path / "cat" / "spring" / "x.JPG", 99)
    for name in ("cat/notes.txt", "cat/Thumbs.db", "cat/._000.png", "readme.md", ".git/x.png", "__MACOSX/cat/000.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    task = load_task(str(tmp_path))
    assert len(task.train) + len(task.val) + len(task.test) == 7
    assert task.skipped == ()


def test_selecting_classes_renumbers_them_and_keeps_their_order(tmp_path):
    fill(tmp_path, {name: 5 for name in "abcde"})
    task = load_task(f"{tmp_path}:d,b")
    assert task.classes == ("b", "d")
    assert set(task.train.labels.tolist()) == {0, 1}
    whole = load_task(str(tmp_path))
    assert set(task.test.sources) == {source for source in whole.test.sources if source[0] in "bd"}


def test_cuts_and_shots_follow_their_seeds(tmp_path):
    fill(tmp_path, {"cat": 40, "dog": 40})

    def sources(text: str, **arguments) -> tuple[set[str], set[str]]:
        task = load_task(f"{tmp_path}{text}", **arguments)
        return set(task.train.sources), set(task.test.sources)

    assert sources("@seed=1") == sources("@seed=1")
    assert sources("@seed=1")[1] != sources("@seed=2")[1]
    assert sources("", shots=5, shots_seed=1)[0] != sources("", shots=5, shots_seed=2)[0]
    assert sources("", shots=5, shots_seed=1)[1] == sources("", shots=9, shots_seed=2)[1]
    assert sources("", shots=5)[0] < sources("", shots=9)[0]
    assert sources("@shots=5,shots_seed=1") == sources("", shots=5, shots_seed=1)


def test_too_many_shots_are_refused(tmp_path):
    fill(tmp_path, {"cat": 40, "dog": 10})
    with pytest.raises(TaskError, match=r"class 'dog' has \d readable images to train on.*fewer than the 10"):
        load_task(str(tmp_path), shots=10)


def test_shots_that_cannot_be_read_are_drawn_again(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 20})
    first = load_task(str(tmp_path), shots=5, val=0)
    (tmp_path / first.train.sources[0]).write_bytes(b"broken")
    again = load_task(str(tmp_path), shots=5, val=0, allow_bad=True)
    assert per_class(again, again.train) == {"cat": 5, "dog": 5}
    assert set(first.train.sources[1:]) < set(again.train.sources)
    assert again.skipped[0][0] == first.train.sources[0]


# Copies of a picture


def test_copies_are_never_divided_between_parts(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 20})
    for number in range(20):
        put(tmp_path / "cat" / f"copy{number}.png", number)
        put(tmp_path / "dog" / f"copy{number}.png", 20 + number)
    task = load_task(str(tmp_path))
    parts = [pictures(split) for split in (task.train, task.val, task.test)]
    assert all(not parts[i] & parts[j] for i in range(3) for j in range(i))
    assert len(task.train) + len(task.val) + len(task.test) == 80
    assert "40 images are copies of others" in task.notes[0]


def test_a_picture_in_two_classes_is_never_divided_between_parts(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 20})
    for number in range(20):
        put(tmp_path / "cow" / f"{number}.png", number)
        put(tmp_path / "cow" / f"own{number}.png", 100 + number)
    task = load_task(str(tmp_path))
    assert not pictures(task.train) & pictures(task.test)


def test_copies_in_another_format_leave_the_training_part(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 20})
    alone = load_task(str(tmp_path), val=0)
    for number in range(20):
        put(tmp_path / "cat" / f"{number:03}.bmp", number)
    task = load_task(str(tmp_path), val=0)
    assert not pictures(task.train) & pictures(task.test)
    assert any("images of train left out: they equal held-out images" in note for note in task.notes)
    assert pictures(alone.train) | pictures(alone.test) == pictures(task.train) | pictures(task.test)


def test_copies_across_given_parts_are_reported_and_kept(tmp_path):
    fill(tmp_path / "train", {"cat": 6, "dog": 6})
    fill(tmp_path / "test", {"cat": 3, "dog": 3})
    task = load_task(str(tmp_path), val=0)
    assert len(task.test) == 6
    assert task.notes == ("6 images of test are also in train",)


# Bad splits


def test_the_only_picture_of_a_class_is_in_the_training_part(tmp_path):
    task = load_task(str(fill(tmp_path, {"cat": 1, "dog": 2, "cow": 3})))
    assert per_class(task, task.train) == {"cat": 1, "cow": 1, "dog": 1}
    assert per_class(task, task.test) == {"cat": 0, "cow": 1, "dog": 1}
    assert "no test images: cat" in task.notes


def test_an_empty_class_folder_is_skipped_with_a_note(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "bat").mkdir()
    task = load_task(str(tmp_path))
    assert task.classes == ("cat", "dog")
    assert "no images, left out: bat" in task.notes


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_cannot_be_trained_is_refused(tmp_path, part):
    fill(tmp_path / "train", {"cat": 5, "dog": 5})
    fill(tmp_path / part, {"cat": 5, "dog": 5, "cow": 5}, 100)
    with pytest.raises(TaskError, match="class 'cow' has images in val or test but none to train on"):
        load_task(str(tmp_path))
    assert load_task(f"{tmp_path}:cat,dog").classes == ("cat", "dog")


@pytest.mark.parametrize("names", [("Cat", "cat"), ("é", "e\u0301"), ("straße", "STRASSE")])
def test_names_that_some_file_systems_cannot_distinguish_are_refused(tmp_path, names):
    fill(tmp_path, dict.fromkeys(names, 3))
    with pytest.raises(TaskError, match="merge or rename"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("counts", [{}, {"cat": 5}])
def test_fewer_than_two_classes_are_refused(tmp_path, counts):
    with pytest.raises(TaskError, match="class"):
        load_task(str(fill(tmp_path, counts)))


def test_a_class_whose_pictures_would_all_be_held_out_with_another_class_keeps_one(tmp_path):
    fill(tmp_path, {"cat": 20, "dog": 20})
    for source in load_task(str(tmp_path)).test.sources:
        (tmp_path / "elk").mkdir(exist_ok=True)
        (tmp_path / "elk" / source.replace("/", "-")).write_bytes((tmp_path / source).read_bytes())
    task = load_task(str(tmp_path))
    assert per_class(task, task.train)["elk"] >= 1
    assert not pictures(task.train) & pictures(task.test)


def test_a_file_or_a_name_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no pictures")
    with pytest.raises(TaskError, match=r"is not a folder, a \.parquet file"):
        load_task(str(tmp_path / "notes.md"))
    fill(tmp_path, {"cat": 3, os.fsdecode(b"d\xffg"): 3})
    with pytest.raises(TaskError, match="not valid UTF-8"):
        load_task(str(tmp_path))


# Bad pictures


def test_bad_pictures_are_listed_and_the_run_continues(tmp_path):
    fill(tmp_path, {"cat": 150, "dog": 150})
    (tmp_path / "cat" / "zero.png").write_bytes(b"")
    (tmp_path / "cat" / "x.png").mkdir()
    (tmp_path / "dog" / "loop.png").symlink_to(tmp_path / "dog" / "loop.png")
    task = load_task(str(tmp_path))
    assert dict(task.skipped) == {
        "cat/zero.png": "empty",
        "cat/x.png": "a directory",
        "dog/loop.png": "too many levels of symbolic links",
    }
    assert len(task.train) + len(task.val) + len(task.test) == 300


def test_more_than_one_percent_of_bad_pictures_is_an_error_unless_allowed(tmp_path):
    fill(tmp_path, {"cat": 50, "dog": 48})
    for name in ("a", "b"):
        (tmp_path / "cat" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(TaskError, match=r"2 of 100 images.*cat/a\.png: not a picture"):
        load_task(str(tmp_path))
    assert len(load_task(str(tmp_path), allow_bad=True).skipped) == 2


def test_a_class_of_bad_pictures_is_refused(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "elk").mkdir()
    (tmp_path / "elk" / "x.png").write_bytes(b"no picture")
    with pytest.raises(TaskError, match="class 'elk' has 0 readable images"):
        load_task(str(tmp_path), allow_bad=True)


def test_names_of_files_that_are_not_text_are_shown_escaped(tmp_path):
    fill(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    assert load_task(str(tmp_path), allow_bad=True).skipped[0][0] == "cat/\\udcff.png"


def test_the_automatic_size_is_the_median_short_side_but_not_large(tmp_path):
    for number, side in enumerate((10, 20, 30, 400, 500)):
        put(tmp_path / "cat" / f"{number}.png", number, (side, 2 * side))
    for number in range(5):
        put(tmp_path / "dog" / f"{number}.png", 50 + number, (25, 30))
    assert load_task(str(tmp_path)).image_size == 25
    assert load_task(f"{tmp_path}@size=12").train.pixels.shape[-2:] == (12, 12)
    assert load_task(str(tmp_path), image_size=14).image_size == 14
    for number in range(30):
        put(tmp_path / "dog" / f"{number}.png", 50 + number, (300, 300))
    assert load_task(str(tmp_path)).image_size == 224


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    fill(tmp_path, {"cat": 3, "dog": 3})
    walked = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return walked(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file modes do not bind the superuser, who may run this
    with pytest.raises(TaskError, match=r"dog cannot be listed: Permission denied"):
        load_task(str(tmp_path))


# The same in every process


def test_the_fingerprint_follows_pixels_labels_and_names(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    before = load_task(str(tmp_path)).fingerprint
    assert load_task(str(tmp_path)).fingerprint == before
    put(tmp_path / "cat" / "000.png", 999)
    changed = load_task(str(tmp_path)).fingerprint
    (tmp_path / "dog").rename(tmp_path / "fox")
    assert len({before, changed, load_task(str(tmp_path)).fingerprint}) == 3


def test_the_order_of_a_directory_does_not_change_the_result(tmp_path, monkeypatch):
    fill(tmp_path, {name: 8 for name in "abcd"})
    put(tmp_path / "a" / "deep" / "er" / "x.png", 77)
    put(tmp_path / "a" / "deer" / "x.png", 78)
    before = load_task(f"{tmp_path}:random-half@shots=3")
    listed, walked = Path.iterdir, os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(walked(path), key=lambda entry: entry.name)

        def __enter__(self):
            return self

        __iter__ = __enter__

        def __exit__(self, *_):
            pass

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self))[::-1])
    monkeypatch.setattr(os, "scandir", Backwards)
    after = load_task(f"{tmp_path}:random-half@shots=3")
    assert (after.fingerprint, after.train.sources) == (before.fingerprint, before.train.sources)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_result_with_any_hash_seed(tmp_path):
    text = f"{fill(tmp_path, {name: 8 for name in 'abcd'})}:random-half@shots=3"
    code = (
        "import sys; from refilled.data import epoch_batches, load_task; task = load_task(sys.argv[1]); "
        "print(task.fingerprint, epoch_batches(task.train.labels, batch_size=4, seed=0, epoch=1)[0].tolist())"
    )
    seed = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    said = subprocess.check_output(
        [sys.executable, "-c", code, text], env={**os.environ, "PYTHONHASHSEED": seed}, text=True
    )
    task = load_task(text)
    batch = epoch_batches(task.train.labels, batch_size=4, seed=0, epoch=1)[0].tolist()
    assert said.strip() == f"{task.fingerprint} {batch}"


# Cutting, by itself


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80), st.floats(0, 0.99))
def test_cuts_keep_groups_together_and_leave_something_to_train_on(images, fraction):
    """Each image is (class, picture); a class's picture id is its own unless two classes draw the same."""
    labels = np.array([label for label, _ in images])
    first: dict[int, int] = {}
    firsts = np.array([first.setdefault(picture, row) for row, (_, picture) in enumerate(images)])
    rows = np.arange(len(images))
    kept, held = hold_out(rows, labels, firsts, fraction, seed=0, purpose="test")
    assert sorted([*kept, *held]) == rows.tolist()
    assert not set(firsts[kept]) & set(firsts[held])
    for label in set(labels[firsts == rows].tolist()):
        leads = np.flatnonzero((firsts == rows) & (labels == label))
        taken = len(set(leads) & set(held))
        assert taken < len(leads)
        assert taken == 0 if fraction == 0 or len(leads) == 1 else taken >= 1
        assert abs(taken - fraction * len(leads)) <= 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80), st.floats(0, 0.99))
def test_cuts_by_content_keep_copies_together_and_leave_something_to_train_on(images, fraction):
    """Each image is (class, picture); two classes may hold the same picture."""
    labels, keys = np.array([label for label, _ in images]), np.array([p for _, p in images], dtype=np.uint64)
    rows = np.arange(len(images))
    kept, held = hold_out_by_content(rows, labels, keys, fraction, seed=0, purpose="test")
    assert sorted([*kept, *held]) == rows.tolist()
    assert not set(keys[kept].tolist()) & set(keys[held].tolist())
    one_class = {k for k in keys.tolist() if len(set(labels[keys == k].tolist())) == 1}
    for label in set(labels.tolist()):
        own = set(keys[labels == label].tolist())
        if own <= one_class:  # otherwise another class may have a say
            taken = len(own & set(keys[held].tolist()))
            assert taken < len(own)
            assert taken == 0 if fraction == 0 or len(own) == 1 else taken >= 1


@pytest.mark.slow
@given(st.sets(st.integers(0, 10**6), min_size=60, max_size=200), st.data())
def test_removing_pictures_moves_no_other(pictures_, data):
    keys = np.array(sorted(pictures_), dtype=np.uint64)
    labels = (keys % np.uint64(2)).astype(np.int64)

    def held(chosen):
        order = np.array(data.draw(st.permutations(np.flatnonzero(chosen).tolist())), dtype=np.int64)
        out = hold_out_by_content(np.arange(len(order)), labels[order], keys[order], 0.3, seed=0, purpose="test")[1]
        return set(keys[order][out].tolist())

    everything = held(np.ones(len(keys), dtype=bool))
    kept = keys % np.uint64(5) != 0
    fewer = held(kept)
    assume(all(len(fewer & set(keys[kept & (labels == c)].tolist())) >= 2 for c in (0, 1)))  # no guarantee was needed
    assert fewer == everything & set(keys[kept].tolist())


def test_a_cut_holds_out_the_fraction_that_was_asked_for():
    keys = np.arange(20000, dtype=np.uint64)
    _, held = hold_out_by_content(np.arange(20000), np.zeros(20000, dtype=int), keys, 0.2, seed=3, purpose="val")
    assert abs(len(held) / 20000 - 0.2) < 4 * (0.2 * 0.8 / 20000) ** 0.5  # four standard errors


def test_an_added_renamed_or_moved_picture_moves_no_other(tmp_path):
    fill(tmp_path / "before", {"cat": 40, "dog": 40})
    before = load_task(str(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    put(tmp_path / "after" / "cat" / "000x.png", 200)
    put(tmp_path / "after" / "dog" / "000x.png", 201)
    (tmp_path / "after" / "cat" / "039.png").rename(tmp_path / "after" / "cat" / "!first.png")
    after = load_task(str(tmp_path / "after"))
    for one, other in ((before.train, after.test), (before.test, after.train), (before.train, after.val)):
        assert not pictures(one) & pictures(other)


def test_shots_do_not_depend_on_other_rows():
    labels = np.arange(60) % 3
    rows = np.arange(60)
    few = draw_shots(rows, labels, 4, seed=0, shots_seed=1)
    assert np.bincount(labels[few]).tolist() == [4, 4, 4]
    without = np.setdiff1d(rows, few[:1])
    assert set(few[1:]) < set(draw_shots(without, labels[without], 4, seed=0, shots_seed=1))
