"""Real images, where they lie at REFILLED_DATA or beside the repository."""

from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from refilled.data import load_task


@pytest.mark.slow
def test_cifar100_is_read_as_it_lies_on_disk(real_data):
    task = load_task("cifar100:98,3", data_root=real_data)
    assert task.classes == ("bear", "woman")
    assert [len(split) for split in (task.train, task.val, task.test)] == [900, 100, 200]
    assert (task.image_size, task.augmentation, task.skipped) == (32, "crop-flip", ())
    table = pq.read_table(real_data / "cifar100" / "test.parquet", columns=["img", "fine_label"])
    for position in (0, 57, 199):
        row = table.slice(int(task.test.sources[position].partition("#")[2]), 1).to_pylist()[0]
        pixels = np.asarray(Image.open(BytesIO(row["img"]["bytes"])))
        assert np.array_equal(task.test.pixels[position].permute(1, 2, 0), pixels)
        assert row["fine_label"] == (3, 98)[task.test.labels[position]]


@pytest.mark.slow
def test_halves_of_cifar100_share_no_class_and_leave_none_out(real_data):
    halves = [
        set(load_task(f"cifar100:{half}@seed=5,shots=1,val=0", data_root=real_data).classes)
        for half in ("random-half", "other-half")
    ]
    assert [len(half) for half in halves] == [50, 50]
    assert not halves[0] & halves[1]


@pytest.mark.slow
def test_coarse_labels_are_a_column_like_any_other(real_data):
    task = load_task("cifar100@label=coarse_label,shots=2,val=0", data_root=real_data)
    assert len(task.classes) == 20
    assert len(task.train) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "classes", "train", "test", "side"),
    [("cub100_84", 100, 2999, 2903, 84), ("omniglot:0-19", 20, 324, 76, 105), ("tinyimagenet64:0-9", 10, 813, 187, 64)],
)
def test_other_data_sets_of_the_data_root_are_found_by_name(real_data, text, classes, train, test, side):
    task = load_task(text, data_root=real_data, val=0)
    assert (task.name, len(task.classes)) == (f"{text}@val=0.0", classes)
    assert (len(task.train), len(task.test), task.image_size) == (train, test, side)
