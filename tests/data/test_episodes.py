"""Class splits, pools and episodes: what they promise for any data, and the official splits on the real ones."""

import csv
import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import folder, picture, put
from refilled.data import list_splits, load_pool, load_task, queries_left, sample_episodes
from refilled.errors import TaskError

CLASSES = [f"c{n}" for n in range(9)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = folder(tmp_path_factory.mktemp("photos"), dict.fromkeys(CLASSES, 6))
    (root / "split.json").write_text(json.dumps({"seen": CLASSES[:4], "val": CLASSES[4:6], "unseen": CLASSES[6:]}))
    (root / "other.json").write_text(json.dumps({"train": ["c[0-2]"], "test": ["c8", "c7"]}))
    return root


sizes = st.lists(st.integers(4, 12), min_size=3, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(2, 3), st.integers(1, 3), st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
def test_an_episode_is_what_it_says(counts, n_way, n_shot, seed, chance):
    ids = [label for label, count in enumerate(counts) for _ in range(count)]
    chance.shuffle(ids)
    labels = torch.tensor(ids)
    n_query = queries_left(labels, n_shot, 15)
    assert n_query == min(15, min(counts) - n_shot)
    drawn = sample_episodes(labels, [3, 0], n_way=n_way, n_shot=n_shot, n_query=n_query, seed=seed)
    for t in range(2):
        assert len(set(drawn.classes[t].tolist())) == n_way
        images = torch.cat([drawn.support[t], drawn.query[t]])
        assert len(images.unique()) == n_way * (n_shot + n_query), "no image twice"
        assert torch.equal(labels[drawn.support[t]], drawn.classes[t][drawn.labels])
        assert torch.equal(labels[drawn.query[t]], drawn.classes[t][drawn.query_labels])


def test_an_episode_depends_on_seed_and_number_alone():
    labels = torch.arange(200) % 10
    many = sample_episodes(labels, range(50), seed=1)
    one = sample_episodes(labels, [17], seed=1)
    assert torch.equal(one.support[0], many.support[17])
    assert torch.equal(one.query[0], many.query[17])
    assert not torch.equal(sample_episodes(labels, [17], seed=2).query, one.query)
    assert len({tuple(row) for row in many.support.tolist()}) == 50


def test_more_shots_add_to_fewer_and_ask_the_same_queries():
    labels = torch.arange(500) % 10
    few, more = (sample_episodes(labels, range(5), n_shot=k, n_query=7) for k in (1, 30))
    assert torch.equal(few.query, more.query)
    for t in range(5):
        assert set(few.support[t].tolist()) < set(more.support[t].tolist())


def test_every_class_and_image_is_drawn_about_equally_often():
    labels = torch.arange(80) % 8
    drawn = sample_episodes(labels, range(2000), n_way=2, n_shot=1, n_query=2)
    classes = torch.bincount(drawn.classes.flatten(), minlength=8).double()
    images = torch.bincount(drawn.support.flatten(), minlength=80).double()
    for counts in (classes, images):
        expected = counts.mean()
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_way": 11}, "11 classes cannot be drawn from 10"),
        ({"n_way": 1}, "n_way = 1 is out of range"),
        ({"n_shot": 0}, "n_shot = 0"),
        ({"n_query": 0}, "n_query = 0"),
        ({"n_shot": 20}, "has 20 images, but 20 shots and at least one query image need 21"),
        ({"n_shot": 15}, "has 5 images left for queries after 15 shots, not 15"),
    ],
)
def test_an_impossible_episode_is_explained(arguments, message):
    with pytest.raises(TaskError, match=message):
        sample_episodes(torch.arange(200) % 10, [0], **arguments)


@pytest.mark.parametrize("name", list_splits())
def test_no_class_is_on_two_sides_of_a_split_of_the_package(name):
    content = json.loads((files("refilled.data") / "splits" / f"{name}.json").read_text())
    names = content["seen"] + content["val"] + content["unseen"]
    assert len(set(names)) == len(names)


def test_a_split_beside_the_images_divides_them(photos):
    pools = {side: load_pool(str(photos), side) for side in ("seen", "val", "unseen")}
    assert [pools[side].classes for side in pools] == [tuple(CLASSES[:4]), ("c4", "c5"), ("c6", "c7", "c8")]
    for number, source in zip(pools["unseen"].train.labels, pools["unseen"].train.sources, strict=True):
        assert source.startswith(f"c{6 + number}/")
    assert len(pools["unseen"].train) == 18
    assert len(pools["unseen"].test) == 0
    assert load_pool(str(photos), "unseen").fingerprint == pools["unseen"].fingerprint != pools["val"].fingerprint


def test_a_split_may_be_named_and_have_patterns_and_the_fields_other_names(photos):
    assert load_pool(f"{photos}@split=other.json", "seen").classes == ("c0", "c1", "c2")
    assert load_pool(f"{photos}@split=other.json", "unseen").classes == ("c7", "c8")
    with pytest.raises(TaskError, match="has no val classes"):
        load_pool(f"{photos}@split=other.json", "val")


def test_a_side_of_a_split_is_a_task_too(photos):
    task = load_task(f"{photos}:seen")
    assert task.classes == tuple(CLASSES[:4])
    assert len(task.train) + len(task.val) + len(task.test) == 24
    assert load_task(task.name).fingerprint == task.fingerprint


def test_parts_without_a_common_class_are_a_split(tmp_path):
    for seed, (part, classes) in enumerate({"train": CLASSES[:4], "val": CLASSES[4:6], "test": CLASSES[6:]}.items()):
        folder(tmp_path / part, dict.fromkeys(classes, 6), seed=seed)
    assert load_pool(str(tmp_path), "unseen").classes == ("c6", "c7", "c8")
    task = load_task(f"{tmp_path}:seen")
    assert min(len(task.train), len(task.val), len(task.test)) > 0


def test_images_of_all_parts_are_in_the_pool(tmp_path):
    folder(tmp_path / "train", dict.fromkeys(CLASSES[:4], 3), seed=0)
    folder(tmp_path / "test", dict.fromkeys(CLASSES[:4], 2), seed=1)
    (tmp_path / "split.json").write_text('{"seen": ["c0", "c1"], "unseen": ["c2", "c3"]}')
    pool = load_pool(str(tmp_path), "unseen")
    assert torch.bincount(pool.train.labels).tolist() == [5, 5]
    assert sum(source.startswith("test/") for source in pool.train.sources) == 4


@pytest.mark.parametrize("layout", ["images", "."])
def test_mini_imagenet_is_read_from_its_lists(tmp_path, layout):
    for part, classes in (("train", CLASSES[:4]), ("val", CLASSES[4:6]), ("test", CLASSES[6:])):
        rows = [(f"{name}_{n}.jpg", name) for name in classes for n in range(3)]
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
        for number, (file, _) in enumerate(rows):
            put(tmp_path / layout / file, picture(number))
    pool = load_pool(str(tmp_path), "unseen")
    assert pool.classes == ("c6", "c7", "c8")
    assert len(pool.train) == 9
    (tmp_path / layout / "c0_1.jpg").unlink()
    with pytest.raises(TaskError, match=r"c0_1\.jpg: no such file"):
        load_pool(str(tmp_path), "seen")
    (tmp_path / "val.csv").write_text("filename,label\n../../secret.jpg,c4\n")
    with pytest.raises(TaskError, match=r"val\.csv, line 2"):
        load_pool(str(tmp_path), "seen")


def test_mini_imagenet_is_read_from_its_class_folders(tmp_path):
    split = json.loads((files("refilled.data") / "splits" / "mini_imagenet.json").read_text())
    for number, name in enumerate(split["seen"] + split["val"] + split["unseen"]):
        put(tmp_path / "mini_imagenet" / name / "1.jpg", picture(number))
    pool = load_pool("mini_imagenet", "unseen", data_root=tmp_path)
    assert pool.classes == tuple(sorted(split["unseen"]))
    assert pool.image_size == 84


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seen": ["c0"], "unseen": ["c9"]}, "unknown class 'c9'; known: c0"),
        ({"seen": ["c0", "c1"], "unseen": ["c1"]}, "class 'c1' in both seen and unseen"),
        ({"seen": ["c0"]}, "names no unseen classes"),
        ({"seen": "c0", "unseen": ["c1"]}, "must list the names of the seen classes"),
        ({"seen": ["c0"], "unseen": ["c1"], "augmentation": "flop"}, "unknown augmentation 'flop'"),
        ({"seen": ["c0"], "unseen": ["c1"], "image_size": "84"}, "image_size of '84' pixels"),
        ([1], "must be"),
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_is_explained(photos, tmp_path, content, message):
    folder(tmp_path, dict.fromkeys(CLASSES, 1))
    (tmp_path / "split.json").write_text(json.dumps(content))
    with pytest.raises(TaskError, match=message):
        load_pool(str(tmp_path), "seen")


def test_without_a_split_it_is_explained_how_to_write_one(photos, tmp_path):
    folder(tmp_path, dict.fromkeys(CLASSES, 1))
    with pytest.raises(TaskError, match=r"write .*split\.json as .*\"seen\""):
        load_pool(str(tmp_path), "seen")
    with pytest.raises(TaskError, match=r"unknown split 'cifar_sf'; did you mean 'cifar_fs'"):
        load_pool(f"{tmp_path}@split=cifar_sf", "seen")
    with pytest.raises(TaskError, match="leave out ':c1'"):
        load_pool(f"{photos}:c1", "seen")
    with pytest.raises(TaskError, match="unknown side 'test'"):
        load_pool(str(photos), "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "side", "classes", "images"),
    [
        ("cub100_84@split=cub_100", "unseen", 28, None),
        ("omniglot@split=omniglot_8", "val", 17, 20),
        ("tinyimagenet64@split=tiny_imagenet", "val", 16, 150),
        ("fc100", "val", 20, 600),
    ],
)
def test_the_real_images_divide_as_published(real_data, text, side, classes, images):
    pool = load_pool(text, side, data_root=real_data, image_size=16)
    assert len(pool.classes) == classes
    counts = np.bincount(pool.train.labels)
    assert images is None or set(counts.tolist()) == {images}


def test_a_split_of_another_folder_is_not_taken_for_that_of_a_named_source(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert load_pool("digits", "seen").classes == ("0", "1", "2", "3")


def test_the_subset_of_cub_is_divided_like_the_whole():
    whole, subset = (
        json.loads((files("refilled.data") / "splits" / f"{name}.json").read_text()) for name in ("cub", "cub_100")
    )
    for side in ("seen", "val", "unseen"):
        assert set(subset[side]) <= {name.replace(" ", "_") for name in whole[side]}
