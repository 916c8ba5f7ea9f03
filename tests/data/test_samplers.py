"""Batches: what each epoch holds, and that nothing but (seed, epoch) decides it."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refilled.data import epoch_batches
from refilled.errors import TaskError

LABELS = torch.arange(230) % 10


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
def test_shuffled_epochs_hold_each_image_once_in_nearly_equal_batches(count, batch_size, epoch):
    batches = epoch_batches(torch.zeros(count), batch_size=batch_size, seed=0, epoch=epoch)
    sizes = [len(batch) for batch in batches]
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == -(-count // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_an_epoch_is_a_function_of_seed_and_epoch(sampler):
    def epoch(seed: int, epoch: int) -> list[int]:
        batches = epoch_batches(LABELS, batch_size=32, seed=seed, epoch=epoch, sampler=sampler)
        return torch.cat(batches).tolist()

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=120),
    st.integers(4, 40),
    st.integers(1, 4),
)
def test_balanced_batches_hold_different_classes_with_equally_many_images(labels, batch_size, images_per_class):
    labels = torch.tensor(labels)
    batches = epoch_batches(
        labels, batch_size=batch_size, seed=0, epoch=0, sampler="balanced", images_per_class=images_per_class
    )
    size_of = Counter(labels.tolist())
    classes = min(batch_size // images_per_class, len(size_of))
    slots: Counter[int] = Counter()
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert len(counts) == classes
        assert set(counts.values()) == {batch_size // classes}
        for label, images in counts.items():
            different = len(set(batch[labels[batch] == label].tolist()))
            assert different == min(images, size_of[label])  # repeats only where the class has too few
        slots.update(counts.keys())
    assert len(batches) == -(-len(labels) // batch_size)
    every = [slots[label] for label in size_of]
    assert max(every) - min(every) <= 1


def test_a_balanced_epoch_of_equal_classes_goes_through_nearly_all_images():
    labels = torch.arange(320) % 10
    batches = epoch_batches(labels, batch_size=40, seed=0, epoch=0, sampler="balanced", images_per_class=4)
    assert len(torch.cat(batches).unique()) == 320


def test_an_empty_part_has_no_batches():
    assert epoch_batches(torch.zeros(0), batch_size=8, seed=0, epoch=0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "at least one image"),
        ({"batch_size": 2, "sampler": "balanced"}, "raise batch_size"),
        ({"batch_size": 8, "sampler": "balance"}, "did you mean 'balanced'"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(TaskError, match=message):
        epoch_batches(LABELS, seed=0, epoch=0, **arguments)
