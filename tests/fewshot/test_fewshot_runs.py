"""Few-shot tests and meta-training as people run them: folders, interruptions, tuning, the command line."""

import json
import signal
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import FewShotRun, MetaRun
from refilled.errors import MethodError, RefilledError, RunError, TaskError
from refilled.fewshot import bank, evaluation, meta_training
from refilled.fewshot.evaluation import FewShotResult, evaluate_few_shot, mean_and_interval
from refilled.fewshot.meta_training import meta_train
from refilled.grid.sharing import shared_testing
from refilled.models import create_model, load_model, save_model
from refilled.training.journal import Interrupted
from refilled.training.progress import Display
from refilled.tuning.few_shot import tune


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_model(create_model("convnet4_average", 5, image_size=16), folder)
    return folder


@pytest.fixture
def run(photos, teacher):
    return FewShotRun(
        data=str(photos), method="linear", teacher=str(teacher), n_way=3, n_shot=2, n_episodes=30, batch=7, threads=1
    )


@pytest.fixture
def meta_run(photos):
    return MetaRun(
        data=str(photos), n_way=3, n_shot=2, n_query=2, n_episodes=12, validate_every=4, n_validation=3, threads=1
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]


def test_a_test_leaves_a_folder_that_explains_itself(run, tmp_path):
    reached = []
    result = evaluate_few_shot(run, tmp_path / "a", lambda *progress: reached.append(progress))
    accuracies = [line["accuracy"] for line in lines(tmp_path / "a")]
    assert len(accuracies) == result.n_episodes == 30
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.interval == pytest.approx(1.96 * np.std(accuracies, ddof=1) / 30**0.5)
    assert [done for done, _, _ in reached] == [7, 14, 21, 28, 30]
    assert reached[-1][1:] == (result.accuracy, result.interval)
    assert result.accuracy > 60
    assert FewShotResult.load(tmp_path / "a") == result
    assert result.data["pool"].endswith(":unseen")
    assert len(result.data["fingerprint"]) == 64
    assert result.n_query == 4
    assert "4 query images per class" in result.data["notes"][0]
    assert result.teacher["name"] == run.teacher
    assert {"refilled", "torch"} <= set(result.versions)


def test_a_batch_of_tasks_is_as_good_as_another(run, tmp_path):
    one = evaluate_few_shot(run, tmp_path / "a")
    other = evaluate_few_shot(replace(run, batch=30), tmp_path / "b")
    assert [line["accuracy"] for line in lines(tmp_path / "a")] == [line["accuracy"] for line in lines(tmp_path / "b")]
    assert one.data["fingerprint"] == other.data["fingerprint"]


def test_tests_of_one_process_embed_an_image_once(run, tmp_path, monkeypatch):
    evaluation._known.cache_clear()
    embedded, embed = [], bank.embed
    monkeypatch.setattr(bank, "embed", lambda *given: (embedded.append(len(given[1])), embed(*given))[1])
    alone = evaluate_few_shot(run, tmp_path / "a")
    first = sum(embedded)
    assert 0 < first <= alone.data["images"]
    evaluate_few_shot(replace(run, method="svm"), tmp_path / "b")
    assert sum(embedded) == first
    torch.manual_seed(1)
    save_model(create_model("convnet4_average", 5, image_size=16), tmp_path / "other")
    evaluate_few_shot(replace(run, teacher=str(tmp_path / "other")), tmp_path / "c")
    assert sum(embedded) == 2 * first, "another model embeds again"


@contextmanager
def in_this_process(jobs):
    """An executor that makes each call when its result is asked for."""

    class Pool:
        def submit(self, function, *arguments):
            later = Future()
            later.result = lambda timeout=None: function(*arguments)
            return later

    yield Pool()


def test_tasks_that_are_shared_are_those_of_one_process_and_resume(run, tmp_path):
    def stop(done, accuracy, interval):
        if done >= 10:
            raise KeyboardInterrupt

    whole = evaluate_few_shot(run, tmp_path / "whole")
    testing = shared_testing(3, in_this_process)
    with pytest.raises(KeyboardInterrupt):
        evaluate_few_shot(run, tmp_path / "shared", stop, testing, jobs=3)
    reached = []
    shared = evaluate_few_shot(run, tmp_path / "shared", lambda done, *_: reached.append(done), testing, jobs=3)
    assert reached == list(range(11, 31)), "small batches, so that the last are not waited for"
    assert shared.accuracy == whole.accuracy
    assert [line["accuracy"] for line in lines(tmp_path / "shared")] == [
        line["accuracy"] for line in lines(tmp_path / "whole")
    ]
    evaluate_few_shot(run, tmp_path / "alone", testing=None)
    assert (tmp_path / "alone" / "run.toml").read_bytes() == (tmp_path / "shared" / "run.toml").read_bytes()


@pytest.mark.slow
def test_the_command_shares_tasks_among_processes(photos, teacher, tmp_path):
    common = ["fewshot", "--data", photos, "--teacher", teacher, "--method", "rkd", "--set", "steps=2", "--n-way", 3]
    accuracies = {}
    for jobs in (1, 2):
        options = ["--n-episodes", 6, "--threads", 1, "--jobs", jobs, "--out", tmp_path / str(jobs), "--json"]
        assert json.loads(refilled(*common, *options))["n_episodes"] == 6
        accuracies[jobs] = [line["accuracy"] for line in lines(tmp_path / str(jobs))]
    assert accuracies[1] == accuracies[2]


def test_an_interrupted_test_resumes(run, tmp_path):
    def stop(done, accuracy, interval):
        if done == 14:
            raise KeyboardInterrupt

    whole = evaluate_few_shot(run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate_few_shot(run, tmp_path / "torn", stop)
    with (tmp_path / "torn" / "tasks.jsonl").open("a") as file:
        file.write('{"task": 14, "accur')  # as a crash in the middle of a write would leave it
    seen = []
    result = evaluate_few_shot(run, tmp_path / "torn", lambda done, *_: seen.append(done))
    assert seen == [21, 28, 30]
    assert result.accuracy == whole.accuracy
    assert [line["task"] for line in lines(tmp_path / "torn")] == list(range(30))


def test_a_finished_test_is_not_repeated_and_another_not_mixed_in(run, tmp_path, monkeypatch):
    first = evaluate_few_shot(run, tmp_path / "a")
    monkeypatch.setattr(evaluation, "load_pool", None)
    assert evaluate_few_shot(run, tmp_path / "a") == first
    with pytest.raises(RunError, match="holds a run of another configuration"):
        evaluate_few_shot(replace(run, seed=1), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious.txt").write_text("")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        evaluate_few_shot(run, tmp_path / "b")


def test_what_cannot_work_leaves_no_folder(run, tmp_path):
    for wrong, kind in (({"n_shot": 6}, TaskError), ({"settings": {"d": 1}}, MethodError), ({"data": "no"}, TaskError)):
        with pytest.raises(kind):
            evaluate_few_shot(replace(run, **wrong), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(TaskError, match="class c11 has 6 images, but 6 shots"):
        evaluate_few_shot(replace(run, n_shot=6), tmp_path / "a")
    with pytest.raises(RunError, match="n_way = 1 is out of range; give 2 or more"):
        replace(run, n_way=1)


def test_the_interval_of_a_single_task_is_unknown():
    assert mean_and_interval([50.0]) == (50.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["protonet", "feat", "maml"])
def test_what_was_meta_trained_is_a_teacher(meta_run, run, tmp_path, method):
    settings = {"steps": 1} if method == "maml" else {}
    result = meta_train(replace(meta_run, method=method, settings=settings), tmp_path / "meta")
    assert 0 <= result.val_accuracy <= 100
    log = [json.loads(line) for line in (tmp_path / "meta" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert result.val_accuracy == max(entry["val_accuracy"] for entry in log)
    assert load_model(tmp_path / "meta").num_classes == 3
    assert (tmp_path / "meta" / "head.safetensors").exists() == (method == "feat")
    tested = evaluate_few_shot(
        replace(run, method=method, teacher=str(tmp_path / "meta"), settings=settings, n_episodes=5), tmp_path / "test"
    )
    assert 0 < tested.accuracy <= 100


@pytest.mark.slow
def test_meta_training_teaches(meta_run, tmp_path):
    """Colours with noise: the untrained embedding is right less often than the trained one."""
    result = meta_train(
        replace(meta_run, n_episodes=40, validate_every=20, n_validation=20, settings={"temperature": 1}),
        tmp_path / "a",
    )
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert result.val_accuracy > 70


@pytest.mark.slow
@pytest.mark.parametrize("method", ["protonet", "feat"])
def test_interrupted_meta_training_resumes_bit_for_bit(meta_run, tmp_path, monkeypatch, method):
    run = replace(meta_run, method=method)
    whole = meta_train(run, tmp_path / "whole")

    class Alarm(Display):
        steps = 0

        def step(self, epoch, images, values):
            Alarm.steps += 1
            if Alarm.steps in (3, 8):  # in the middle of epochs
                signal.raise_signal(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted):
            meta_train(run, tmp_path / "torn", display=Alarm())
        torch.rand(100)  # what else draws random numbers must not matter
    torn = meta_train(run, tmp_path / "torn", display=Alarm())
    assert torn.val_accuracy == whole.val_accuracy
    assert Alarm.steps == 12
    for name in ("model.safetensors", "log.jsonl", *(["head.safetensors"] if method == "feat" else [])):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "torn" / "last.ckpt").exists()
    monkeypatch.setattr(meta_training, "load_pool", None)
    assert meta_train(run, tmp_path / "torn") == torn


def test_meta_training_may_start_from_a_model(meta_run, teacher, tmp_path):
    meta_train(replace(meta_run, start=str(teacher), lr=1e-12), tmp_path / "a")
    before, after = load_model(teacher), load_model(tmp_path / "a")
    assert after.architecture == "convnet4_average"
    assert after.num_classes == 3
    torch.testing.assert_close(after.blocks[0][0].weight, before.blocks[0][0].weight)
    with pytest.raises(RunError, match="there is no folder no/such"):
        meta_train(replace(meta_run, start="no/such"), tmp_path / "b")
    with pytest.raises(MethodError, match="not meta-trained"):
        meta_train(replace(meta_run, method="linear"), tmp_path / "b")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"d": "1..2"}, "unknown parameter 'd'"),
        ({"c": "2..1"}, "c=2..1 is not a range"),
        ({"c": "a..b"}, "c=a..b is not a range"),
        ({"normalize": "0..1"}, "normalize is not a number"),
    ],
)
def test_a_search_that_makes_no_sense_is_explained(run, tmp_path, search, message):
    pytest.importorskip("optuna")
    with pytest.raises(RunError, match=message):
        tune(run, search, trials=1, n_episodes=1, storage=tmp_path / "t", progress=print)


def test_tuning_looks_at_validation_classes_alone_and_resumes(run, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    asked, load = [], evaluation.load_pool
    monkeypatch.setattr(
        evaluation, "load_pool", lambda text, side, **more: (asked.append(side), load(text, side, **more))[1]
    )
    said = []
    search = {"search": {"c": "0.001..10:log", "normalize": "true,false"}, "n_episodes": 5, "storage": tmp_path / "t"}
    settings = tune(run, trials=3, progress=said.append, **search)
    assert set(asked) == {"val"}
    assert len(said) == 3
    assert 0.001 <= settings["c"] <= 10
    assert isinstance(settings["normalize"], bool)
    assert tune(run, trials=3, progress=said.append, **search) == settings
    assert len(said) == 3, "nothing is tried twice"
    tune(run, trials=4, progress=said.append, **search)
    assert len(said) == 4


def refilled(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.slow
def test_the_command_tests_a_folder_of_your_own(photos, teacher, tmp_path):
    common = ["fewshot", "--data", photos, "--teacher", teacher, "--n-way", 3, "--n-episodes", 6, "--threads", 1]
    shown = refilled(*common, "--method", "svm", "--set", "c=3", "--out", tmp_path / "a", "--quiet")
    assert "over 6 tasks" in shown
    found = json.loads(refilled(*common, "--method", "svm", "--set", "c=3", "--out", tmp_path / "a", "--json"))
    assert found["n_episodes"] == 6
    assert f"± {found['interval']:.2f}" in shown
    assert "c = 3.0" in (tmp_path / "a" / "run.toml").read_text()
    student = [*common, "--method", "refilled", "--set", "steps=2", "--n-shot", 2, "--out", tmp_path / "b", "--json"]
    assert json.loads(refilled(*student))["seed"] == 0
    pytest.importorskip("optuna")
    tuned = ["--method", "linear", "--tune", "c=0.1..1", "--trials", 2, "--tune-episodes", 2, "--out", tmp_path / "c"]
    assert json.loads(refilled(*common, *tuned, "--json"))["n_episodes"] == 6


def test_the_command_meta_trains(photos, tmp_path):
    common = ["--n-way", 3, "--n-query", 2, "--n-episodes", 4, "--validate-every", 2, "--n-validation", 2]
    shown = refilled("meta-train", "--data", photos, *common, "--threads", 1, "--out", tmp_path / "a", "--quiet")
    assert "best on validation tasks" in shown
    assert load_model(tmp_path / "a").architecture == "convnet4"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--method", "liner"], "did you mean 'linear'"),
        (["--n-way", "9"], "9 classes cannot be drawn from 4"),
        (["--n-episodes", "0"], "n_episodes = 0 is out of range"),
        (["--tune", "c"], "is not KEY=VALUE"),
        (["--method", "refilled", "--set", "student=wrn_15_1", "--set", "steps=1"], "depth"),
        (["--method", "svm"], "needs a model of the seen classes; pass one with --teacher"),
    ],
)
def test_a_mistake_gets_an_explanation(photos, tmp_path, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefilledError) as caught:
        refilled("fewshot", "--data", photos, "--n-way", 3, *arguments)
    assert hint in str(caught.value)


def test_the_few_shot_methods_are_listed():
    shown = refilled("list", "fewshot")
    for name in ("protonet", "feat", "maml", "refilled", "svm"):
        assert name in shown
