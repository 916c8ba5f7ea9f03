"""Images without labels: which ones a task takes, and how they come in batches."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from drawn import folder, picture, png, put
from refilled.data import Views, joined_batches, load_task, task_size
from refilled.data.store import JoinedImages, StoredImages
from refilled.errors import TaskError


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of ten pictures, with test pictures."""
    for seed, part in enumerate(("train", "test")):
        folder(tmp_path / "photos" / part, {"a": 10, "b": 10}, size=8, seed=seed)
    return tmp_path / "photos"


def test_rest_is_what_the_shots_left_out(photos):
    alone = load_task(str(photos), shots=3, val=0.2)
    task = load_task(str(photos), shots=3, val=0.2, unlabelled="rest")
    assert task.fingerprint == alone.fingerprint
    assert set(task.unlabelled.labels.tolist()) == {-1}
    every = load_task(str(photos), val=0.2).train.sources
    assert len(task.unlabelled) == len(every) - 2 * 3
    assert sorted([*task.train.sources, *task.unlabelled.sources]) == sorted(every)
    assert task_size(str(photos), shots=3, val=0.2, unlabelled="rest").unlabelled == len(task.unlabelled)


def test_other_shots_or_images_are_other_data_to_a_cache_but_the_same_task(photos, tmp_path):
    few, none = (load_task(str(photos), shots=3, unlabelled=text) for text in ("rest", None))
    assert few.fingerprint == none.fingerprint
    assert none.seen_fingerprint == none.fingerprint != few.seen_fingerprint


def test_rest_without_shots_is_refused(photos):
    with pytest.raises(TaskError, match="give --shots"):
        load_task(str(photos), unlabelled="rest")


@pytest.fixture
def heap(tmp_path, photos) -> Path:
    """Pictures at any depth, among them copies of two test pictures and of one that is trained on."""
    root = tmp_path / "heap"
    for number in range(5):
        put(root / ("deep/er" if number % 2 else ".") / f"{number}.png", picture(number, 8))
    for number, copied in enumerate(("test/a/00.png", "test/b/03.png", "train/a/01.png")):
        (root / "deep" / f"copy{number}.png").write_bytes((photos / copied).read_bytes())
    return root


def test_copies_of_test_images_are_left_out_of_a_heap_and_it_is_noted(photos, heap):
    task = load_task(str(photos), unlabelled=str(heap))
    assert len(task.unlabelled) == 6
    assert "2 unlabelled images left out: they equal images of val or test" in task.notes
    test = {image.numpy().tobytes() for image in task.test.pixels}
    assert not test & {image.numpy().tobytes() for image in task.unlabelled.pixels}


def test_a_heap_of_nothing_but_test_images_is_refused(photos):
    with pytest.raises(TaskError, match="no unlabelled image is left"):
        load_task(str(photos), unlabelled=str(photos / "test"))


def test_images_on_disk_are_those_in_memory(photos, heap, tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    inside, outside = (load_task(str(photos), unlabelled=str(heap), memory_limit=limit) for limit in (None, 0))
    assert isinstance(outside.unlabelled.pixels, StoredImages)
    every = torch.arange(len(inside.unlabelled))
    assert torch.equal(inside.unlabelled.pixels, outside.unlabelled.pixels.index_select(0, every))
    assert inside.seen_fingerprint == outside.seen_fingerprint


def test_a_table_and_shards_need_no_labels(photos, tmp_path):
    found = [png(picture(number, 8)) for number in range(4)]
    pq.write_table(pa.table({"image": found}), tmp_path / "bare.parquet")
    with tarfile.open(tmp_path / "bare.tar", "w") as shard:
        for number, content in enumerate(found):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    for text in (f"{tmp_path}/bare.parquet", f"wds:{tmp_path}/bare.tar"):
        assert len(load_task(str(photos), unlabelled=text).unlabelled) == 4
        assert task_size(str(photos), unlabelled=text).unlabelled == 4
    with pytest.raises(TaskError):  # but a task does
        load_task(f"{tmp_path}/bare.parquet")


def test_a_task_gives_its_training_images_of_the_chosen_classes():
    task = load_task("digits:5-9", unlabelled="digits:0,1")
    assert len(task.unlabelled) == len(load_task("digits:0,1", val=0.0).train)


def test_joined_images_are_gathered_in_any_order():
    first, second = (torch.randint(256, (n, 3, 4, 4), dtype=torch.uint8) for n in (3, 5))
    joined, together = JoinedImages(first, second), torch.cat([first, second])
    assert joined.shape == together.shape
    for index in ([7, 0, 3, 2], [0, 1], [4], [2, 5], []):
        positions = torch.tensor(index, dtype=torch.int64)
        assert torch.equal(joined.index_select(0, positions), together.index_select(0, positions))


@pytest.mark.parametrize("mixing", [{"mixup": 0.5}, {"cutmix": 1.0}])
def test_the_partner_of_a_labelled_image_has_a_label(mixing):
    joined = JoinedImages(*(torch.zeros(n, 3, 4, 4, dtype=torch.uint8) for n in (3, 50)))
    indices = torch.arange(53)
    for view in range(20):
        partners = Views("none", **mixing).partners_in(joined, indices, seed=0, view=view)
        assert torch.equal(partners < 3, indices < 3)


@pytest.mark.parametrize(("labelled", "unlabelled"), [(4, 50), (50, 4), (20, 20), (1, 7)])
@pytest.mark.parametrize("batch", [(1, 3), (4, 4)])
def test_an_epoch_deals_out_both_kinds_evenly(labelled, unlabelled, batch):
    batch = min(batch[0], labelled), min(batch[1], unlabelled)
    steps = max(-(-labelled // batch[0]), -(-unlabelled // batch[1]))
    dealt = [
        joined_batches(torch.zeros(labelled), unlabelled, batch=batch, steps=steps, seed=3, epoch=epoch)
        for epoch in range(2)
    ]
    for batches in dealt:
        assert len(batches) == steps
        for indices in batches:
            assert len(indices.unique()) == len(indices) <= sum(batch)
            known = indices < labelled
            assert 0 < known.sum() <= batch[0]
            assert 0 < (~known).sum() <= batch[1]
            assert torch.equal(known, known.sort(descending=True).values)  # labelled ones first
        counts = torch.cat(batches).bincount(minlength=labelled + unlabelled)
        assert counts[:labelled].max() - counts[:labelled].min() <= 1
        assert counts[labelled:].max() - counts[labelled:].min() <= 1
        assert counts.min() >= 1
    assert not torch.equal(torch.cat(dealt[0]), torch.cat(dealt[1]))
