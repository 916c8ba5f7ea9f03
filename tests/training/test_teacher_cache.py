"""The teacher's embeddings on disk: what the live teacher would say, whoever built them and whatever befell them."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.compare.page import RowResults, on_the_cache
from refilled.config import Run
from refilled.data import Split, Task, Views, augment, load_task
from refilled.errors import RunError
from refilled.models import load_teacher
from refilled.runs.experiment import distill
from refilled.runs.result import Result
from refilled.runs.teacher_caches import build_cache, embedder, find_cache
from refilled.training.teacher_cache import VIEW_SEED, Contents, TeacherCache

QUICK = Run(
    task="digits:5-9", student="wrn_10_1", method="rkd", epochs=2, batch_size=20, shots=8, threads=1, views=3,
    precision="32-true",
)  # fmt: skip


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def run(teacher) -> Run:
    return replace(QUICK, teacher=teacher)


def made_up(images: int = 50) -> Task:
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randint(256, (images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    train = Split(pixels, torch.arange(images) % 2, ("",) * images)
    nothing = Split(pixels[:0], train.labels[:0], ())
    return Task("made up", ("a", "b"), train, nothing, nothing, 8, "crop-flip", fingerprint="")


def colours(images: torch.Tensor) -> torch.Tensor:
    """A teacher that a test can afford: the mean of the left half of each channel."""
    return images[..., :4].float().mean((2, 3))


def empty_cache(
    folder: Path, images: int = 50, views: int = 2, shard_images: int = 16, teacher: str = "t"
) -> TeacherCache:
    contents = Contents(teacher, "d", images, 3, views, "crop-flip", "32-true", shard_images)
    return TeacherCache(folder, contents)


def content(cache: TeacherCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.glob("*.f32")}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_cache_equals_the_live_teacher_on_the_same_views(run, precision):
    cache = build_cache(replace(run, precision=precision, device="cpu"))
    task = load_task(run.task, shots=run.shots)
    live = embedder(load_teacher(run.teacher), Fabric(accelerator="cpu", precision=precision))
    for view in range(3):
        indices = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(view))[:20]
        images = augment(task.train.pixels[indices], indices, seed=VIEW_SEED, view=view, kind=task.augmentation)
        torch.testing.assert_close(cache(view, indices), live(images).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shard_images", [1, 7, 25, 50, 64])
def test_the_size_of_the_shards_does_not_matter(tmp_path, shard_images):
    task = made_up()
    cache = empty_cache(tmp_path, shard_images=shard_images)
    cache.build(task, colours)
    indices = torch.randint(50, (80,), generator=torch.Generator().manual_seed(0))  # some of them twice
    for view in range(2):
        seen = augment(task.train.pixels, torch.arange(50), seed=VIEW_SEED, view=view, kind="crop-flip")
        assert torch.equal(cache(view, indices), colours(seen)[indices])
    assert cache.size == sum(path.stat().st_size for path in tmp_path.glob("*.f32"))


@pytest.mark.parametrize(
    "mixing",
    [{"mixup": 0.4}, {"cutmix": 1.0}, {"auto_augment": "rand", "color_jitter": 0.4, "random_erasing": 0.5}],
    ids=str,
)
def test_it_says_what_the_live_teacher_says_about_mixed_and_altered_images(tmp_path, mixing):
    task = made_up()
    cache = TeacherCache(tmp_path, replace(empty_cache(tmp_path).contents, **mixing))
    cache.build(task, colours)
    for view in range(2):
        seen = Views("crop-flip", **mixing).load(task.train.pixels, torch.arange(50), seed=VIEW_SEED, view=view)
        assert torch.equal(cache(view, torch.arange(50)), colours(seen))


@pytest.mark.slow
def test_every_setting_that_changes_the_embeddings_gets_a_separate_cache(run, teacher, tmp_path):
    other = tmp_path / "other"
    distill(Run(task="digits:0-4", student="wrn_10_1", epochs=1, shots=5, batch_size=20, threads=1), other)
    changes = [
        {}, {"teacher": str(other)}, {"views": 2}, {"shots": 7}, {"augmentation": "none"}, {"precision": "bf16-mixed"},
        {"teacher_mean": (0.1, 0.2, 0.3)}, {"image_size": 8}, {"mixup": 0.4}, {"cutmix": 1.0},
        {"auto_augment": "trivial"}, {"auto_augment": "rand"}, {"color_jitter": 0.4}, {"color_jitter": 0.3},
        {"random_erasing": 0.4},
    ]  # fmt: skip
    folders = [find_cache(replace(run, **change)).folder for change in changes]
    assert len(set(folders)) == len(changes)
    same = [{"method": "refilled"}, {"epochs": 9}, {"lr": 0.01}, {"student": "wrn_16_1"}]
    assert {find_cache(replace(run, **change)).folder for change in same} == {folders[0]}


def test_caches_from_before_an_option_are_those_of_runs_without_it():
    cache = Contents("t", "d", 50, 3, 2, "crop-flip", "32-true")
    old = {"teacher": "t", "data": "d", "images": 50, "embedding_dim": 3, "views": 2, "augmentation": "crop-flip"}
    old |= {"precision": "32-true", "shard_images": 16384, "mixup": 0.0, "cutmix": 0.0, "schema": 3}
    assert cache.key == sha256(json.dumps(old).encode()).hexdigest()[:16]
    assert Contents(**old) == cache


DAMAGE = {
    "a bit of an embedding": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "a bit of the checksum": lambda body: body[:-1] + bytes([body[-1] ^ 128]),
    "torn": lambda body: body[: len(body) // 2],
    "nothing but a name": lambda body: b"",
    "zeros": lambda body: bytes(len(body)),
    "too long": lambda body: body + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_reported_and_rebuilt_and_the_others_are_kept(tmp_path, damage):
    cache, task, said = empty_cache(tmp_path), made_up(), []
    cache.build(task, colours)
    whole, before = content(cache), {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.f32")}
    hurt = cache.path(5)
    hurt.write_bytes(DAMAGE[damage](hurt.read_bytes()))
    assert list(cache.problems()) == [5]
    cache.build(task, colours, say=said.append)
    assert content(cache) == whole
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [hurt]
    assert re.fullmatch(r"teacher cache: shard 6 of 8 is (torn|damaged).*; embedding its images", said[0])
    assert len(said) == 1


def test_a_cache_made_for_something_else_is_refused(tmp_path):
    task = made_up()
    mine, theirs = empty_cache(tmp_path / "mine"), empty_cache(tmp_path / "theirs", teacher="another")
    for cache in (mine, theirs):
        cache.build(task, colours)
    shutil.copy(theirs.path(0), mine.path(0))
    shutil.copy(mine.path(1), mine.path(5))  # another view of the same images
    assert {shard: reason.split(":")[0] for shard, reason in mine.problems().items()} == dict.fromkeys(
        (0, 5), "damaged, or made for another teacher, task or view"
    )


def test_an_interrupted_build_resumes_where_it_stopped(tmp_path):
    task, calls = made_up(), []

    def breaking(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return colours(images)

    whole, cache = empty_cache(tmp_path / "whole"), empty_cache(tmp_path / "broken")
    whole.build(task, colours)
    with pytest.raises(KeyboardInterrupt):
        cache.build(task, breaking)
    assert list(cache.problems().values()) == ["missing"] * 5
    cache.build(task, breaking)
    assert content(cache) == content(whole)
    assert sum(calls) == 2 * 50 + calls[3]  # nothing but the shard that broke off was embedded twice


def test_a_full_disk_is_reported_and_complete_shards_remain(tmp_path, monkeypatch):
    cache, task = empty_cache(tmp_path), made_up()
    cache.build(task, colours, shards=[0])
    whole = content(cache)

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("refilled.training.teacher_cache.write_atomic", full)
    with pytest.raises(RunError, match=r"No space left on device\. The cache needs 0\.0 MB; make room"):
        cache.build(task, colours)
    assert content(cache) == whole


def test_a_part_of_it_can_be_built(tmp_path):
    cache, task = empty_cache(tmp_path), made_up()
    cache.build(task, colours, shards=[6, 1])
    assert set(cache.problems()) == {0, 2, 3, 4, 5, 7}
    assert cache.shards_on_disk() == 2


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # a spawned process would import for seconds
FORK = multiprocessing.get_context("fork")


@forks
def test_another_process_finishes_the_work_of_a_killed_one(tmp_path):
    cache = empty_cache(tmp_path)
    at_it = FORK.Event()

    def hang(images):
        if cache.shards_on_disk() == 2:
            at_it.set()
            time.sleep(60)
        return colours(images)

    process = FORK.Process(target=cache.build, args=(made_up(), hang))
    process.start()
    assert at_it.wait(20)
    (tmp_path / f".{cache.path(2).name}.{process.pid}.tmp").write_bytes(b"half")  # as a write that was cut short
    process.kill()
    process.join()
    cache.build(made_up(), colours)
    assert cache.problems() == {}
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
@forks
def test_two_processes_share_the_work(tmp_path):
    cache, task = empty_cache(tmp_path / "together", shard_images=5), made_up()
    start, said = FORK.Barrier(2), FORK.SimpleQueue()

    def slow(images):
        time.sleep(0.02)
        return colours(images)

    def build(name):
        start.wait()
        cache.build(task, slow, say=lambda text: said.put((name, re.search(r"shard (\d+) of 20", text)[1])))
        said.put((name, "whole" if not cache.problems() else "not whole"))

    builders = [FORK.Process(target=build, args=(name,)) for name in "ab"]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    lines = []
    while not said.empty():
        lines.append(said.get())
    made = [(name, int(text)) for name, text in lines if text.isdigit()]
    assert sorted(shard for _, shard in made) == list(range(1, 21))  # each by one of them
    assert {name for name, _ in made} == {"a", "b"}
    assert sorted(text for _, text in lines if not text.isdigit()) == ["whole", "whole"]
    alone = empty_cache(tmp_path / "alone", shard_images=5)
    alone.build(task, colours)
    assert content(cache) == content(alone)


def test_the_work_can_be_sent_elsewhere_in_parts(run):
    cache = find_cache(run)
    for shard in range(cache.contents.shards):
        elsewhere, shards = pickle.loads(pickle.dumps((run, [shard])))
        assert build_cache(elsewhere, shards).problem(shard) is None
        assert len(cache.problems()) == cache.contents.shards - shard - 1


def test_a_run_takes_a_cache_that_was_built_before_and_reports_how_far_it_is_from_live(run, tmp_path):
    cache = build_cache(run)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.f32")}
    result = distill(run, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.f32")} == before
    gap = result.teacher["cache"]
    assert (gap["views"], gap["images"]) == (3, 40)
    assert gap["largest_difference"] < 1e-4
    assert gap["live_accuracy"] == gap["cached_accuracy"] > 0
    assert Result.load(tmp_path / "run") == result
    (said,) = on_the_cache(RowResults("RKD", [result], [tmp_path / "run"]))
    assert "3 views" in said
    assert "mixed" not in said
    assert f"{gap['live_accuracy']:.1f} % in the live teacher's embeddings" in said


def test_a_page_says_that_few_are_right_because_they_are_mixed(run, tmp_path):
    result = distill(replace(run, cutmix=1.0, epochs=1), tmp_path / "run")
    (said,) = on_the_cache(RowResults("RKD", [result], [tmp_path / "run"]))
    assert "training images, each mixed with another image, with" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "dkd", "refilled"])
def test_logits_come_from_the_embeddings_kept(method, tmp_path, monkeypatch):
    known = tmp_path / "known"
    distill(Run(task="digits:5-9", student="wrn_10_1", epochs=1, shots=30, batch_size=20, threads=1), known)
    settings = {"kd_targets": "logits"} if method == "refilled" else {}
    run = replace(QUICK, teacher=str(known), method=method, settings=settings, views=2)
    kept = distill(run, tmp_path / "kept")
    assert kept.teacher["cache"]["views"] == 2
    # The same images before the live teacher.
    monkeypatch.setattr("refilled.runs.experiment.cache_for", lambda *arguments: None)
    live = distill(run, tmp_path / "live")
    assert "cache" not in (live.teacher or {})
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("kept", "live")]
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=1e-3)


def test_the_gap_shows_what_is_lost(run):
    cache = find_cache(run)
    task = load_task(run.task, shots=run.shots)
    live = embedder(load_teacher(run.teacher), Fabric(accelerator="cpu"))
    cache.build(task, lambda images: live(images).roll(1, 0))  # each image's embedding is another's
    gap = cache.gap(task, live)
    assert gap.largest_difference > 0.5
    assert gap.live_accuracy != gap.cached_accuracy


def test_without_a_teacher_or_a_number_of_views_there_is_nothing_to_build(run):
    with pytest.raises(RunError, match="give the number with --views"):
        build_cache(replace(run, views=None))
    with pytest.raises(RunError, match="name one with --teacher"):
        build_cache(replace(run, teacher=None, method="vanilla"))


def refilled(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands_build_show_and_check(run, caches, teacher):
    assert refilled("cache", "info") == ""  # there is none
    flags = [run.task, "--teacher", teacher, "--views", 3, "--shots", 8, "--precision", "32-true", "--threads", 1]
    said = refilled("cache", "build", *flags)
    cache = find_cache(run)  # so that the flags of a run find what the command built
    assert cache.problems() == {}
    assert said.count("embedding its images") == 3
    shown = refilled("cache", "info")
    assert "40 images x 3 views x 64 numbers, 3 of 3 shards" in shown
    assert f"of {teacher}, in 32-true\n  on digits:5-9" in shown
    assert "embedding" not in refilled("cache", "build", *flags)
    assert f"{cache.folder.name}: 3 of 3 shards complete" in refilled("cache", "verify")
    cache.path(1).write_bytes(cache.path(1).read_bytes()[:-5])
    said = refilled("cache", "verify", code=1)
    assert re.search(r"view-0001-images-00000000.f32: torn: [\d,]+ bytes, not", said)
    assert f"{cache.folder.name}: 2 of 3 shards complete" in said
    manifest = cache.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    assert "holds no readable teacher cache" in refilled("cache", "verify")
    refilled("cache", "build", *flags, "--quiet")
    assert json.loads(manifest.read_text())["contents"] == asdict(cache.contents)
    assert f"{cache.folder.name}: 3 of 3 shards complete" in refilled("cache", "verify")
    assert [path.name for path in caches.iterdir()] == ["teacher"]
