"""Several processes as one: the same loss and gradient, one that writes, and all that end together."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn

from ranks import Ranks
from refilled.cli import app as cli
from refilled.config import Run
from refilled.data import Split, Task
from refilled.errors import NonFiniteError, RankError, RunError
from refilled.methods import list_methods, load_method
from refilled.models import Backbone, create_model
from refilled.models.backbone import freeze
from refilled.presets import with_preset
from refilled.recipe import Recipe
from refilled.runs.experiment import begin, distill, resume
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import Prepared, resolve
from refilled.runs.result import Result
from refilled.stages import Stage
from refilled.training import distributed
from refilled.training.distributed import ALONE, World, joined
from refilled.training.evaluation import predict, predict_classes_twice
from refilled.training.journal import Interrupted, RunJournal
from refilled.training.loop import fit
from refilled.training.progress import Display

IMAGES = 13  # no number of ranks divides it
STAGED = [name for name in list_methods() if name not in ("fine_tune", "linear_probe", "nearest_neighbour", "svm")]
SINGLE_PRECISION = {"crd"}  # it computes in float32 whatever it is given


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


class Plain(Backbone):
    """A network without batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width, width), 3)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2)
        self.class_names = ("a", "b", "c")

    def embed(self, images):
        shallow = self.first(images).tanh()
        deep = self.second(shallow).tanh()
        return deep.mean((2, 3)), (shallow, deep)


class Quiet:
    """A journal that keeps nothing."""

    def restore(self):
        return None

    def checkpoint_due(self):
        return False

    def __getattr__(self, name):
        return lambda *arguments: None


class Cached:
    """Made-up embeddings, as a teacher's cache would hold them."""

    def __call__(self, view, indices):
        return torch.randn(2, IMAGES, 6, generator=torch.Generator().manual_seed(0))[view, indices]


@dataclass(frozen=True)
class Averaging(World):
    """A world that does with gradients what DistributedDataParallel does."""

    def sum_gradients(self, divided, repeated):
        divided = list(divided)
        super().sum_gradients(divided, repeated)
        for parameter in divided:
            if parameter.grad is not None:
                parameter.grad /= self.size


@dataclass(frozen=True)
class Apart(World):
    """A world in which every rank has a batch norm of its own."""

    def global_batch_norm(self):
        return contextlib.nullcontext()


def small_task(images: int = IMAGES) -> Task:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    train = Split(pixels, torch.arange(images) % 3, ("",) * images)
    return Task("small", ("a", "b", "c"), train, train, train, 8, "crop-flip", fingerprint="")


def trained(
    world: World,
    method: str = "refilled",
    settings: dict | None = None,
    student: str | None = None,
    like: type[World] = World,
    poison: int | None = None,
    **changes,
) -> dict[str, np.ndarray]:
    """Take a step of each stage in float64; returns the last gradients, and what was trained."""
    world = like(world.rank, world.size)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        teacher, model = freeze(Plain(6)), create_model(student, 3, image_size=8) if student else Plain(5)
        model.class_names = teacher.class_names
        if poison == world.rank:
            model.classifier.weight.register_hook(lambda gradient: gradient * torch.nan)
        stages = load_method(method).build(model, teacher, settings or {})
        if method in SINGLE_PRECISION:
            nn.ModuleList(term.loss for stage in stages for term in stage.terms.values()).float()
        recipe = Recipe(**{"epochs": len(stages), "batch_size": IMAGES, "lr": 0.01, "warmup": 0.0, **changes})
        fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
        cache = Cached() if recipe.views else None
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            fit(model, teacher, small_task(), stages, recipe, fabric, Quiet(), cache, world)
        except NonFiniteError as error:
            unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            return {"error": str(error), "unchanged": unchanged}
        return measured(model, stages)
    finally:
        torch.set_default_dtype(torch.float32)


def measured(student: Backbone, stages: list[Stage]) -> dict[str, np.ndarray]:
    modules = {"student": student} | {f"{s.name}/{name}": term.loss for s in stages for name, term in s.terms.items()}
    found = {}
    for where, module in modules.items():
        found |= {f"{where}/{name}": value for name, value in module.state_dict().items()}
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found |= {f"gradient of {where}/{name}": g for name, g in gradients.items() if g is not None}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def gradients(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for name, value in found.items() if name.startswith("gradient of student")])


def ratio(many: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> float:
    a, b = gradients(many), gradients(one)
    return float(a @ b / (b @ b))


def assert_same(many: list[dict[str, np.ndarray]], one: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    for rank in many[1:]:
        assert all(np.array_equal(rank[name], many[0][name], equal_nan=True) for name in one)  # to the bit
    assert many[0].keys() == one.keys()
    assert abs(ratio(many[0], one) - 1) < tolerance
    for name, value in one.items():
        np.testing.assert_allclose(many[0][name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_row_belongs_to_one_rank_and_parts_differ_by_at_most_one_row():
    for size in range(1, 9):
        for count in range(1, 258):
            parts = [range(count)[World(rank, size).part(count)] for rank in range(size)]
            assert [row for part in parts for row in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGED)
def test_two_processes_train_like_one(two, method):
    assert_same(two(trained, method), trained(ALONE, method), 1e-6 if method in SINGLE_PRECISION else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"embedding_share": 1.0}, {}),  # the classifier is left without a gradient
        ({"negatives": "semihard", "centers": "leave-one-out"}, {}),
        ({"centers": "global", "regression_weight": 3.0, "trust": 1.0}, {"batch_size": 5, "epochs": 6}),
        ({"centers": "global", "regression_weight": 3.0}, {"head_steps": 5}),
        ({}, {"mixup": 0.5}),
        ({}, {"cutmix": 1.0}),
        ({}, {"views": 2}),
        ({}, {"auto_augment": "trivial", "color_jitter": 0.4, "random_erasing": 0.5}),
        ({}, {"sampler": "balanced", "batch_size": 12}),
        ({}, {"batch_size": 5, "epochs": 4}),  # parts of one image and of two
    ],
    ids=str,
)
def test_four_processes_train_like_one(four, settings, changes):
    assert_same(four(with_changes, settings, changes), with_changes(ALONE, settings, changes), 1e-12)


def with_changes(world, settings, changes):
    return trained(world, "refilled", settings, **changes)


@pytest.mark.slow
def test_averaging_the_gradients_would_be_detected(two, four):
    one = trained(ALONE, "refilled", {"gamma": 0.1})
    for ranks in (two, four):
        wrong = ranks(trained, "refilled", {"gamma": 0.1}, None, Averaging)[0]
        assert ratio(wrong, one) == pytest.approx(1 / len(ranks.processes))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["wrn_10_1", "timm/mobilenetv3_small_050"])
def test_batch_norm_is_that_of_the_whole_batch(two, student):
    one = trained(ALONE, "vanilla", None, student)
    assert_same(two(trained, "vanilla", None, student), one, 1e-9)
    wrong = two(trained, "vanilla", None, student, Apart)[0]
    assert abs(ratio(wrong, one) - 1) > 1e-3


def normalized(world, dtype: torch.dtype, training: bool, affine: bool, momentum: float | None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    norm = nn.BatchNorm1d(3, affine=affine, momentum=momentum).train(training)
    norm.to(torch.promote_types(dtype, torch.float32))
    part = world.part(len(x))
    with world.global_batch_norm():
        for _ in range(2):
            y = norm(x[part])
    y = world.gather(y, len(x))
    (y * torch.arange(21).view(7, 3) ** 2).sum().backward()
    by_x = world.gather(x.grad[part], len(x))
    return [value.detach().double().numpy() for value in (y, by_x, norm.running_mean, norm.running_var)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, None)])
def test_batch_norm_equals_that_of_torch_in_every_setting(two, dtype, tolerance, training, affine, momentum):
    torchs = normalized(ALONE, dtype, training, affine, momentum)
    for rank in two(normalized, dtype, training, affine, momentum):
        for ours, theirs in zip(rank, torchs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def predicted(world, images: int):
    torch.manual_seed(0)
    outputs = predict(Plain(5), small_task().train.pixels[:images], world=world)
    return [outputs.logits.numpy(), outputs.embedding.numpy()]


@pytest.mark.slow
@pytest.mark.parametrize("images", [0, 1, 3, IMAGES])  # fewer than ranks, too
def test_each_image_is_predicted_once_and_all_ranks_get_the_result(four, images):
    for rank in four(predicted, images):
        for mine, whole in zip(rank, predicted(ALONE, images), strict=True):
            np.testing.assert_allclose(mine, whole, rtol=1e-5)


def classified(world, images: int):
    torch.manual_seed(0)
    task = small_task()
    found = predict_classes_twice(Plain(5), task.train, task.train.pixels[:images], world=world)
    return [classes.numpy() for classes in found]


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, IMAGES])
def test_each_image_is_classified_once_and_all_ranks_know_it(four, images):
    for rank in four(classified, images):
        for mine, whole in zip(rank, classified(ALONE, images), strict=True):
            np.testing.assert_array_equal(mine, whole)


def gathered(world, dtype):
    rows = torch.arange(10).view(5, 2).to(dtype)
    return world.gather(rows[world.part(5)], 5).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.int64, torch.float32], ids=str)
def test_rows_of_every_type_are_gathered(four, dtype):
    for rank in four(gathered, dtype):
        np.testing.assert_array_equal(rank, torch.arange(10).view(5, 2).to(dtype).double().numpy())


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_step(two):
    for rank in two(trained, "vanilla", None, None, World, 1):
        assert "The step was not taken" in rank["error"]
        assert rank["unchanged"]


@pytest.mark.slow
def test_more_processes_than_images_in_a_batch_are_refused(four):
    for error in four(with_changes, {}, {"batch_size": 3}):
        assert isinstance(error, RunError)
        assert "4 processes need as many images in every batch, but one has 2" in str(error)


def refused_by_rank_0(world):
    def refuse():
        raise RunError(f"rank {world.rank} says no")

    world.lead(refuse)


@pytest.mark.slow
def test_what_rank_0_finds_or_refuses_all_ranks_do(two):
    assert [str(error) for error in two(refused_by_rank_0)] == ["rank 0 says no"] * 2


def holding(world):
    world.check_same(images="these", teacher=f"teacher {world.rank}")


@pytest.mark.slow
def test_ranks_that_hold_different_things_do_not_train(two):
    assert {str(error) for error in two(holding)} == {
        "rank 1 has other teacher than rank 0; give all machines the same files and versions"
    }


class Signalled(Display):
    """Sends one rank a signal at a step, as somebody might."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, epoch, images, values):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


QUICK = Run(
    task="digits:5-9",
    student="wrn_10_1",
    method="refilled",
    epochs=4,
    batch_size=20,
    shots=8,
    threads=1,
    precision="64-true",
)


def carried_out(world: World, run: Run, folder: Path, stop: int | None = None) -> int:
    """Start or resume a run. Rank 1 stops after this many steps. Returns the signal that ended the run."""
    display = Signalled(stop) if stop and world.rank == 1 else Display()
    prepared = Prepared(resolve(run))
    try:
        begin(prepared, RunFolder(folder), display, 60.0, world)
    except Interrupted as interruption:
        return interruption.number
    return 0


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill(replace(QUICK, teacher=teacher), folder)
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same up to rounding: the losses of every epoch, the weights and the result."""
    ours, theirs = (load_file(where / "model.safetensors") for where in (folder, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    logs = [map(json.loads, (where / "log.jsonl").read_text().splitlines()) for where in (folder, whole)]
    for entry, expected in zip(*logs, strict=True):
        assert entry.pop("stage") == expected.pop("stage")
        assert entry == pytest.approx(expected, rel=1e-4)
    assert Result.load(folder).accuracy == pytest.approx(Result.load(whole).accuracy, abs=1)
    assert not list(folder.glob("*.ckpt"))


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(two, teacher, whole, tmp_path):
    run, folder = replace(QUICK, teacher=teacher), tmp_path / "b"
    with pytest.raises(Interrupted):
        distill(run, folder, display=Signalled(2))
    assert two(carried_out, run, folder, 3) == [signal.SIGTERM] * 2  # it came to one of them
    assert (folder / "last.ckpt").exists()
    resume(folder)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_resumes_bit_for_bit(two, teacher, tmp_path):
    run = replace(QUICK, teacher=teacher, mixup=0.4)
    digests = []
    for name, stops in (("a", [None]), ("b", [3, 2, None])):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            assert two(carried_out, run, folder, stop) == [signal.SIGTERM if stop else 0] * 2
        digests.append([(folder / file).read_bytes() for file in ("model.safetensors", "log.jsonl")])
    assert digests[0] == digests[1]


NOISE = """
import torch

class Noise(torch.nn.Module):
    def forward(self, x):
        seeds = (1000 * x.double().abs().sum((1, 2, 3))).long().tolist()
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

def noise():
    return Noise(), {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
"""


@pytest.mark.slow
def test_all_processes_ignore_a_teacher_with_nothing_to_teach(two, tmp_path):
    (tmp_path / "noise.py").write_text(NOISE)
    taught = replace(QUICK, **with_preset("good", {"teacher": f"{tmp_path}/noise.py:noise"}))
    alone = replace(QUICK, method="vanilla", teacher=None, settings={})
    for name, run in (("a", taught), ("b", alone)):
        (tmp_path / name).mkdir()
        assert two(carried_out, run, tmp_path / name, None) == [0, 0]
    assert json.loads((tmp_path / "a" / "teacher.json").read_text())["ignored"] is True
    digests = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert digests[0] == digests[1]


def ends(world, how):
    if world.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit("as an exception that nobody catches would")
    world.largest(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "fails"])
def test_when_a_rank_ends_the_others_end(how):
    ranks = Ranks(2)
    began = time.monotonic()
    survivor, ended = ranks.survivors(ends, how)
    ranks.close()
    assert isinstance(survivor, RankError)
    assert ended is None
    assert time.monotonic() - began < 30


# A rank is killed by its own hand, after the step that a state was saved of.
_KILLED = """
import os, signal, sys
from pathlib import Path
from refilled.runs.experiment import distill
from refilled.training.progress import Display
from refilled.config import Run

class Killing(Display):
    steps = 0
    def step(self, epoch, images, values):
        self.steps += 1
        if self.steps == 6 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
run = Run.from_toml((folder.parent / "run.toml").read_text())
distill(run, folder, display=Killing(), seconds_between_saves=0)
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_named_and_the_run_resumes_to_the_same_result(teacher, whole, tmp_path):
    (tmp_path / "run.toml").write_text(replace(QUICK, teacher=teacher).to_toml())
    (tmp_path / "killed.py").write_text(_KILLED)
    killed = torchrun(str(tmp_path / "killed.py"), str(tmp_path / "b"))
    assert killed.returncode != 0
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", killed.stderr), killed.stderr
    assert (tmp_path / "b" / "last.ckpt").exists()
    finished = torchrun("-m", "refilled", "distill", "--resume", str(tmp_path / "b"), "--json", "--no-report")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["hardware"]["processes"] == 2  # one object: rank 0 alone has spoken
    assert_same_run(tmp_path / "b", whole)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
def test_processes_that_cannot_meet_are_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*torchrun"), joined():
        pass
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_TO_MEET", distributed.timedelta(seconds=1))
    with pytest.raises(RunError, match=r"the 2 processes did not meet at 127.0.0.1:1"), joined():
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match=r"more processes than GPUs \(1\)"), joined():
        pass


@pytest.mark.parametrize("command", ["compare", "reproduce", "tune", "evaluate"])
def test_commands_of_many_runs_refuse_torchrun(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "_first_to_tell", lambda message: True)
    monkeypatch.setattr(sys, "argv", ["refilled", command, "digits:0-4"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert f"start 'refilled {command}' without torchrun" in capsys.readouterr().err


def told(world, message):
    return distributed.first_to_tell(message)


@pytest.mark.slow
def test_an_error_on_all_ranks_is_reported_once(four):
    assert sum(four(told, "no such teacher")) == 1
    assert sum(four(told, "another error")) == 1


def test_journals_of_other_ranks_leave_the_folder_alone(tmp_path):
    journal = RunJournal(tmp_path, Display(), world=World(rank=1, size=1))
    journal.epoch({"epoch": 1})
    journal.end_stage(Stage("embedding", {}), Plain(5))
    assert not list(tmp_path.iterdir())
