"""A run from its configuration to its result: the one file that knows all parts.

A run's folder explains itself: ``run.toml`` (the configuration, fully resolved), ``log.jsonl``, ``result.json``,
the student (``model.safetensors`` and ``model.json``), ``stages/`` (the student after each stage but the last),
``last.ckpt`` while unfinished, and ``DONE`` when whole. A method that trains nothing leaves no student.
"""

import json
import logging
import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from refilled.config import WHERE, Run, what
from refilled.data import Pixels, Split, Task, load_task
from refilled.data.decode import SUFFIXES, read_pixels
from refilled.errors import RunError, TaskError
from refilled.files import cache_folder, write_atomic
from refilled.methods import load_method
from refilled.models import Backbone, create_model, load_model, load_teacher, save_model, trainable_copy
from refilled.runs.determinism import give_memory_back, use_machine
from refilled.stages import FineTuning, Readout, Stage
from refilled.training.checkpoints import discard_states, hold
from refilled.training.distributed import ALONE, World, joined
from refilled.training.evaluation import (
    SCORING_BATCH,
    accuracy,
    class_accuracies,
    embed,
    nearest_center_accuracy,
    predict,
    predict_classes,
    predict_classes_twice,
)
from refilled.training.journal import RunJournal
from refilled.training.loop import fit, resolve_precision, views_of
from refilled.training.progress import Display
from refilled.training.teacher_cache import TeacherCache, fingerprint, teacher_cache

RUN_FILES = ("run.toml", "log.jsonl", "result.json", "model.safetensors", "model.json", "DONE")

_BATCH = 256
_FEW_STEPS = 300

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would tell of each precision plugin


@dataclass(frozen=True)
class Result:
    """What a finished run found: the content of ``result.json``."""

    accuracy: float
    """Percent of the test images, or of the held-out ones where the run scores those, after the last epoch."""
    ncm_accuracy: float
    """Percent by the nearest class mean of the training images, in the embedding of the network that is scored."""
    class_accuracies: dict[str, float | None]
    stages: dict[str, dict[str, float]]
    """Nearest-class-mean accuracy after each stage but the last."""
    seconds: float
    """Of training and of loading, over all starts of the run."""
    parameters: int
    """Of the network that is scored: the student, or the teacher where its embedding is all there is."""
    data: dict[str, Any]
    teacher: dict[str, Any] | None
    versions: dict[str, str]
    hardware: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a finished run's result.

        Raises:
            RunError: the run is not finished.
        """
        if not (folder / "DONE").exists():
            raise RunError(f"{folder} holds no finished run")
        return cls(**json.loads((folder / "result.json").read_text(encoding="utf-8")))


def distill(run: Run, folder: Path, *, display: Display | None = None, seconds_between_saves: float = 60.0) -> Result:
    """Train a student as the run says, test it once, and leave everything in a new folder.

    Processes that torchrun started train it together; rank 0 writes, and each returns the result.

    Raises:
        RunError: the folder already holds a run; it is left as it is.
        RefilledError: anything in the run that cannot work, found before training begins where it can be.
    """
    with joined() as world, ExitStack() as held:
        world.lead(lambda: _refuse_used(folder))
        prepared = _Prepared(resolve(run))  # fails before anything is written, if it fails
        world.lead(lambda: held.enter_context(_new(folder)))
        return _begin(prepared, folder, display or Display(), seconds_between_saves, world)


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        _refuse_used(folder)  # again, since another process may have been quicker
        yield


def check(run: Run) -> None:
    """Look up all that a run names, and train nothing.

    Raises:
        RefilledError: anything in the run that cannot work, as far as it can be found before training.
    """
    _Prepared(resolve(run))


def prepare(run: Run, task: Task) -> "_Prepared":
    """Look up all that a resolved run names but its images, for which those of a task with equal classes stand.

    Raises:
        RefilledError: anything in the run that cannot work, as far as it can be found without its images.
    """
    return _Prepared(run, task)


def resume(
    folder: Path,
    *,
    where: Mapping[str, Any] | None = None,
    display: Display | None = None,
    seconds_between_saves: float = 60.0,
) -> Result:
    """Go on with an interrupted run, exactly as if it had not been interrupted; a finished one gives its result.

    Processes that torchrun started go on together, however many there were before; in another number of them, or
    elsewhere, the run ends as it would have up to rounding.

    Args:
        folder: Of the run.
        where: Values of fields named in :data:`~refilled.config.WHERE` that hold from now on, and are recorded.
        display: Where progress is shown.
        seconds_between_saves: Of the state.

    Raises:
        RunError: there is no run in the folder, another process is at it, or ``where`` names something else or a
            device that cannot be used here.
        CheckpointError: its saved states are damaged.
    """
    if others := sorted(set(where or ()) - set(WHERE)):
        raise RunError(f"a run goes on as it was begun: {', '.join(others)} cannot change, only {', '.join(WHERE)}")
    with joined() as world, ExitStack() as held:
        world.lead(lambda: held.enter_context(_begun(folder)))
        return _go_on(folder, where or {}, display or Display(), seconds_between_saves, world)


@contextmanager
def _begun(folder: Path) -> Iterator[None]:
    if not (folder / "run.toml").exists():
        raise RunError(f"{folder} holds no run to go on with")
    with nullcontext() if (folder / "DONE").exists() else hold(folder):
        yield


def complete(run: Run, folder: Path, *, display: Display | None = None, seconds_between_saves: float = 60.0) -> Result:
    """Begin a run, or go on with it where it stands; a finished one gives its result.

    Several processes may ask for the same run in the same folder: one carries it out. It is the same run wherever it
    is carried out, so that what one machine has begun, another can end; a teacher that lies beside the folder may have
    been moved along with it.

    Raises:
        InUseError: another process is at it.
        RunError: the folder holds another run, or something that is none.
        RefilledError: anything in the run that cannot work.
    """
    display = display or Display()
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        if not (folder / "run.toml").exists():
            _refuse_used(folder)
            return _begin(_Prepared(resolve(run)), folder, display, seconds_between_saves)
        recorded, wanted = _recorded(folder), _to_record(run)
        moved = _moved_along(recorded.get("teacher"), run.teacher, folder)
        if what(recorded | ({"teacher": run.teacher} if moved else {})) != what(wanted):
            raise RunError(f"{folder} holds a run of another configuration; remove it or choose another folder")
        if moved:
            write_atomic(folder / "run.toml", replace(_load_run(folder), teacher=run.teacher).to_toml().encode())
        where = {name: wanted.get(name) for name in WHERE}
        return _go_on(folder, where, display, seconds_between_saves)


def _begin(
    prepared: "_Prepared", folder: Path, display: Display, seconds_between_saves: float, world: World = ALONE
) -> Result:
    world.lead(lambda: write_atomic(folder / "run.toml", prepared.run.to_toml().encode()))
    return _carry_out(prepared, folder, display, seconds_between_saves, world)


def _go_on(
    folder: Path, where: Mapping[str, Any], display: Display, seconds_between_saves: float, world: World = ALONE
) -> Result:
    finished = world.lead(lambda: Result.load(folder) if (folder / "DONE").exists() else None)
    if finished is not None:
        return finished
    prepared = _Prepared(world.lead(lambda: _load_unfinished(folder, where)))
    if where:
        world.lead(lambda: write_atomic(folder / "run.toml", prepared.run.to_toml().encode()))
    return _carry_out(prepared, folder, display, seconds_between_saves, world)


def evaluate(folder: Path, task: str | None = None, data_root: str | None = None) -> dict[str, Any]:
    """Score a student on the test part of its own task, or of another with the same classes.

    Raises:
        RunError: the folder holds no student, or the task has other classes.
    """
    model = _load_student(folder)
    run = _load_run(folder)
    data = _load_task(replace(run, task=task or run.task, data_root=data_root or run.data_root))
    if data.classes != model.class_names:
        raise RunError(f"{task} has other classes than the student in {folder}")
    found = predict_classes(model, data.test.pixels)
    return {
        "task": data.name,
        "images": len(data.test),
        "accuracy": accuracy(found, data.test.labels),
        "class_accuracies": _by_class(data, class_accuracies(found, data.test.labels, len(data.classes))),
    }


def overwrite(folder: Path) -> None:
    """Remove a run from its folder, and nothing that is not the run's.

    Raises:
        RunError: the folder holds something, but no run; or another process is at the run.
    """
    if not (folder / "run.toml").exists():
        return
    with hold(folder):
        shutil.rmtree(folder / "stages", ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        discard_states(folder)


def _refuse_used(folder: Path) -> None:
    if (folder / "DONE").exists():
        raise RunError(f"{folder} holds a finished run; choose another --out, or replace it with --overwrite")
    if (folder / "run.toml").exists():
        raise RunError(
            f"{folder} holds an unfinished run; go on with 'refilled distill --resume {folder}', "
            "or replace it with --overwrite"
        )
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run; choose another --out")


def teacher_accuracy(folder: Path) -> float | None:
    """Score the teacher of a run as a nearest-class-mean classifier of the run's own images, in percent.

    It says how much the teacher has to teach: its embedding knows the student's classes from the training images alone.
    None for a run without a teacher.
    """
    run = _load_run(folder)
    teacher = _load_teacher(run)
    if teacher is None:
        return None
    task = _load_task(run)
    train, test = (embed(_placed(teacher), split.pixels) for split in (task.train, task.test))
    mean = train.mean(0)  # what all images share says nothing about them
    return nearest_center_accuracy(train - mean, task.train.labels, test - mean, task.test.labels)


def task_of(folder: Path) -> Task:
    """Load the images of a run's task."""
    return _load_task(_load_run(folder))


def network_of(folder: Path, stage: str | None = None) -> Backbone:
    """Load the network that a finished run's result is about, as it was at the end or after an earlier stage.

    It is the run's student, or the teacher where the method trained none.

    Raises:
        RunError: the run has no such stage.
        ModelError: the folder holds no student.
    """
    if _trained_nothing(folder):
        teacher = _load_teacher(_load_run(folder))
        assert teacher is not None  # or there would be no result
        return _placed(teacher)
    student = load_model(folder)
    if stage is not None:
        path = folder / "stages" / f"{stage}.safetensors"
        if not path.exists():
            raise RunError(f"{folder} does not hold the student after a stage '{stage}'")
        student.load_state_dict(load_file(path))
    return _placed(student)


def classify(
    folder: Path, images: Iterable[Path]
) -> tuple[list[tuple[Path, dict[str, float]]], list[tuple[Path, str]]]:
    """Give each image's probability of each class, and for images that cannot be read the reason.

    Args:
        folder: A student's folder.
        images: Image files, or folders whose images, at any depth, are taken.

    Raises:
        RefilledError: the folder holds no student, or there is no image.
    """
    model = _load_student(folder)
    paths = [path for image in images for path in _images_in(image)]
    if not paths:
        raise TaskError("no images were found; name image files, or folders that hold some")
    assert model.image_size is not None  # every model that can be saved has one
    assert model.class_names is not None  # every student has them
    readable: list[tuple[Path, dict[str, float]]] = []
    unreadable: list[tuple[Path, str]] = []
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        pixels, reasons = read_pixels(batch, len(batch), model.image_size)
        probabilities = predict(model, pixels).logits.softmax(1).tolist()
        kept = [path for position, path in enumerate(batch) if position not in reasons]
        readable += [
            (p, dict(zip(model.class_names, row, strict=True))) for p, row in zip(kept, probabilities, strict=True)
        ]
        unreadable += [(batch[position], reason) for position, reason in reasons.items()]
    return readable, unreadable


def _images_in(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.suffix.lower() in SUFFIXES)
    return [path]


def resolve(run: Run) -> Run:
    """Settle what the run leaves to the machine and to the method's defaults, so that its folder says what was done.

    Raises:
        RefilledError: the device cannot be used here, or the method or a parameter of it does not exist.
    """
    device = find_device(run.device)
    precision = resolve_precision(run.precision, device)
    method = load_method(run.method)
    student = run.student if method.takes_student else None
    settings = method.settle(run.settings)
    threads = run.threads or torch.get_num_threads()
    return replace(run, student=student, device=device.type, precision=precision, settings=settings, threads=threads)


def find_device(name: str) -> torch.device:
    """Find a device by its name; ``auto`` is the accelerator, where there is one.

    Raises:
        RunError: the device cannot be used here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device '{name}' cannot be used here, choose another with --device: {reason}") from error
    return device


def _load_run(folder: Path) -> Run:
    path = folder / "run.toml"
    if not path.exists():
        raise RunError(f"{folder} holds no run: there is no {path.name}")
    return Run.from_toml(path.read_text(encoding="utf-8"))


def _recorded(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))


def _to_record(run: Run) -> dict[str, Any]:
    """Return what the folder of a run would record: all of it, so that what is missing there had no name yet."""
    return tomllib.loads(resolve(run).to_toml())


def _moved_along(recorded: str | None, wanted: str | None, folder: Path) -> bool:
    """Tell whether a run's teacher, which lies beside the run, did so elsewhere before."""
    if recorded is None or wanted is None or recorded == wanted or Path(recorded).exists():
        return False
    return Path(wanted).parent == folder.parent and Path(wanted).name == Path(recorded).name


def _load_unfinished(folder: Path, where: Mapping[str, Any]) -> Run:
    run = resolve(replace(_load_run(folder), **where))
    wanted, recorded = _to_record(run), _recorded(folder)
    new = [
        *(what(wanted).keys() - recorded.keys()),
        *(wanted["settings"].keys() - recorded.get("settings", {}).keys()),
    ]
    if new:
        raise RunError(
            f"{folder} was begun by a version of refilled, or of its method, that had no {', '.join(sorted(new))}; "
            "go on with that version, or begin anew with --overwrite"
        )
    return run


def _trained_nothing(folder: Path) -> bool:
    done, saved = ((folder / name).exists() for name in ("DONE", "model.json"))
    return done and not saved and _load_run(folder).student is None


def _load_student(folder: Path) -> Backbone:
    if _trained_nothing(folder):
        raise RunError(
            f"{folder} holds no student: '{_load_run(folder).method}' reads the embedding of its teacher and trains "
            "nothing; what it reached is in result.json"
        )
    return _placed(load_model(folder))


def _placed(model: Backbone) -> Backbone:
    """Bring a model to the accelerator, if there is one."""
    return model.to(find_device("auto"))


def _load_teacher(run: Run) -> Backbone | None:
    if run.teacher is None:
        return None
    name = os.path.expandvars(run.teacher)
    return load_teacher(name, mean=run.teacher_mean, std=run.teacher_std, input_size=run.teacher_size)


def _load_task(run: Run) -> Task:
    return load_task(
        run.task,
        data_root=Path(run.data_root) if run.data_root else None,
        shots=run.shots,
        shots_seed=run.seed,
        val=run.val,
        image_size=run.image_size,
        memory_limit=None if run.image_memory is None else int(run.image_memory * 2**30),
        unlabelled=run.unlabelled,
    )


class _Prepared:
    """A run with everything that it names looked up and checked."""

    student: Backbone
    """The network that is scored: what the stages train, or the frozen teacher itself for a readout."""

    def __init__(self, run: Run, task: Task | None = None) -> None:
        self.run = run
        use_machine(run.threads, run.device)
        method = load_method(run.method)
        self.task = _load_task(run) if task is None else task
        if run.score == "val" and len(self.task.val) == 0:
            raise RunError("score = 'val' needs images that are held out; give --val above 0")
        self.teacher = _load_teacher(run)
        torch.manual_seed(run.seed)
        student = None if run.student is None else self._fresh(run.student)
        plan = method.build(student, self.teacher, run.settings)
        self.stages: list[Stage] = []
        self.readout: Readout | None = None
        if isinstance(plan, Readout):
            assert self.teacher is not None  # the method has checked it, as what the assertions below say
            self.readout, self.student = plan, self.teacher
        elif isinstance(plan, FineTuning):
            assert self.teacher is not None
            self.stages, self.student = list(plan.stages), self._copy(self.teacher)
        else:
            assert student is not None
            self.stages, self.student = list(plan), student
            if not any(stage.needs_teacher for stage in plan):
                self.teacher = None

    @property
    def scored(self) -> Split:
        """The images that the result is about."""
        return self.task.test if self.run.score == "test" else self.task.val

    def _fresh(self, architecture: str) -> Backbone:
        # Published weights expect the normalisation that they were trained with; fresh ones suit the data.
        mean, std = (None, None) if self.run.pretrained else channel_statistics(self.task.train.pixels)
        student = create_model(
            architecture,
            len(self.task.classes),
            image_size=self.task.image_size,
            mean=mean,
            std=std,
            pretrained=self.run.pretrained,
        )
        student.class_names = self.task.classes
        return student

    def _copy(self, teacher: Backbone) -> Backbone:
        student = trainable_copy(teacher, self.task.classes, torch.Generator().manual_seed(self.run.seed))
        student.image_size = self.task.image_size
        return student


def _carry_out(
    prepared: _Prepared, folder: Path, display: Display, seconds_between_saves: float, world: World = ALONE
) -> Result:
    run, student, teacher = prepared.run, prepared.student, prepared.teacher
    fabric = _fabric(run, world)
    prepared.task = task = prepared.task.near(fabric.device)
    if world.size > 1:
        models = {"teacher": teacher and fingerprint(teacher), "student": fingerprint(student)}
        world.check_same(images=task.seen_fingerprint, **models)
    journal = RunJournal(folder, display, seconds_between_saves, world)
    try:
        if prepared.readout is None:
            cache = _cache(prepared, fabric, display)
            with journal.catching_signals():
                fit(student, teacher, task, prepared.stages, run, fabric, journal, cache, world, run.cuda_graphs)
            give_memory_back()  # which scoring would ask for in other pieces
            result = _measure(prepared, folder, journal.seconds, world)
            if cache is not None:
                result = replace(result, teacher={**(result.teacher or {}), "cache": _gap(prepared, cache, fabric)})
        else:
            journal.restore()  # nothing; but there is a log, if an empty one
            student.to(fabric.device)
            result = replace(_measure(prepared, folder, 0.0, world), seconds=journal.seconds)
    finally:
        display.close()
    return world.lead(lambda: _conclude(prepared, folder, result))


def _conclude(prepared: _Prepared, folder: Path, result: Result) -> Result:
    if prepared.readout is None:
        save_model(prepared.student, folder)
    write_atomic(folder / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    write_atomic(folder / "DONE", b"")
    discard_states(folder)
    return result


def _cache(prepared: _Prepared, fabric: Fabric, display: Display) -> TeacherCache | None:
    run, teacher, task = prepared.run, prepared.teacher, prepared.task
    if run.views is None or teacher is None or not any(stage.embedding_suffices for stage in prepared.stages):
        return None
    cache = _cache_of(run, teacher, task)
    cache.build(task, _embedder(teacher, fabric), say=display.message)
    return cache


def _gap(prepared: _Prepared, cache: TeacherCache, fabric: Fabric) -> dict[str, Any]:
    assert prepared.teacher is not None  # or there would be no cache
    return {"views": cache.contents.views, **asdict(cache.gap(prepared.task, _embedder(prepared.teacher, fabric)))}


def _embedder(teacher: Backbone, fabric: Fabric) -> Callable[[Tensor], Tensor]:
    """The teacher's embedding of images, computed as the training loop computes it."""
    teacher.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), fabric.autocast():
            embedding: Tensor = teacher(images.to(fabric.device)).embedding
        return embedding

    return embed


def build_cache(
    run: Run, shards: Iterable[int] | None = None, say: Callable[[str], None] = lambda text: None
) -> TeacherCache:
    """Embed the views that a run will ask its teacher for, or the part of them in some shards, before the run.

    Only what decides the embeddings counts of the run: task, teacher, views, augmentation, precision, image size. All
    that goes in can be sent to another process; any number of them, given the same run, share the work.

    Args:
        run: The run.
        shards: Numbers of shards, below ``find_cache(run).contents.shards``; None for all.
        say: Told of every shard that is made.

    Raises:
        RefilledError: the run has no teacher or no number of views, or names something that cannot be found.
    """
    run, teacher, task = _cacheable(run)
    cache = _cache_of(run, teacher, task)
    cache.build(task, _embedder(teacher, _fabric(run)), shards, say)
    return cache


def find_cache(run: Run) -> TeacherCache:
    """Find the cache that a run would use, whether or not anything of it is built yet.

    Raises:
        RefilledError: as :func:`build_cache`.
    """
    return _cache_of(*_cacheable(run))


def list_caches() -> list[Path]:
    """Return the folders of all teacher caches of this machine."""
    return sorted(path.parent for path in (cache_folder() / "teacher").glob("*/manifest.json"))


def _cacheable(run: Run) -> tuple[Run, Backbone, Task]:
    if run.views is None:
        raise RunError("a cache holds a fixed number of views of each image; say how many with --views")
    run = resolve(run)
    use_machine(run.threads, run.device)
    teacher = _load_teacher(run)
    if teacher is None:
        raise RunError("a cache holds what a teacher says; name one with --teacher")
    return run, teacher, _load_task(run)


def _cache_of(run: Run, teacher: Backbone, task: Task) -> TeacherCache:
    assert run.views is not None  # whoever asks has checked it
    return teacher_cache(
        cache_folder() / "teacher",
        teacher,
        task,
        number=run.views,
        views=views_of(run, task),
        precision=run.precision,
        names=(run.teacher or "", task.name),
    )


def _fabric(run: Run, world: World = ALONE) -> Fabric:
    devices = [world.local_rank] if run.device == "cuda" else 1
    return Fabric(accelerator=run.device, devices=devices, precision=run.precision)  # type: ignore[arg-type]


def _measure(prepared: _Prepared, folder: Path, seconds: float, world: World) -> Result:
    """Look at the images that are to be scored, for the only time."""
    run, task, student, teacher = prepared.run, prepared.task, prepared.student, prepared.teacher
    device, labels = torch.device(run.device), prepared.scored.labels
    if prepared.readout is None:
        found, nearest = predict_classes_twice(student, task.train, prepared.scored.pixels, device, world)
        ncm_accuracy = accuracy(nearest, labels)
    else:
        train, scored = (embed(student, split.pixels, device, world) for split in (task.train, prepared.scored))
        found = prepared.readout.classify(train, task.train.labels, scored)
        ncm_accuracy = nearest_center_accuracy(train, task.train.labels, scored, labels)
    return Result(
        accuracy=accuracy(found, labels),
        ncm_accuracy=ncm_accuracy,
        class_accuracies=_by_class(task, class_accuracies(found, labels, len(task.classes))),
        stages=_measure_stages(prepared, folder, world),
        seconds=seconds,
        parameters=sum(p.numel() for p in student.parameters()),
        data={
            "task": task.name,
            "fingerprint": task.fingerprint,
            "images": {"train": len(task.train), "val": len(task.val), "test": len(task.test)},
            "scored": run.score,
            "image_size": task.image_size,
            "skipped": [list(pair) for pair in task.skipped],
            "notes": [*task.notes, *_unseen(prepared), *(_few_steps(run, task) if prepared.stages else [])],
            **_unlabelled(run, prepared),
        },
        teacher=None if teacher is None else {"name": run.teacher, "fingerprint": fingerprint(teacher)},
        versions=versions(),
        hardware={
            "device": device_name(device),
            "processes": world.size,
            "threads": run.threads,
            "precision": run.precision,
        },
    )


def _measure_stages(prepared: _Prepared, folder: Path, world: World) -> dict[str, dict[str, float]]:
    """Score the student as each stage but the last left it."""
    student, task, scored, found = prepared.student, prepared.task, prepared.scored, {}
    final = {name: value.clone() for name, value in student.state_dict().items()}
    for stage in prepared.stages[:-1]:
        weights = world.lead(partial(_weights_after, stage, folder))
        if weights is not None:
            student.load_state_dict(weights)
            _, nearest = predict_classes_twice(student, task.train, scored.pixels, prepared.run.device, world)
            found[stage.name] = {"ncm_accuracy": accuracy(nearest, scored.labels)}
    student.load_state_dict(final)
    return found


def _weights_after(stage: Stage, folder: Path) -> dict[str, Tensor] | None:
    path = folder / "stages" / f"{stage.name}.safetensors"
    return load_file(path) if path.exists() else None


def _unlabelled(run: Run, prepared: _Prepared) -> dict[str, Any]:
    """Return what the record says of unlabelled images: where they are from, how many, and their fingerprint."""
    task = prepared.task
    if task.unlabelled is None:
        return {}
    digest = task.unlabelled_fingerprint
    return {"unlabelled": {"source": run.unlabelled, "images": len(task.unlabelled), "fingerprint": digest}}


def _unseen(prepared: _Prepared) -> list[str]:
    """Return a note where there are unlabelled images that no loss has a use for."""
    if prepared.task.unlabelled is None or any(stage.sees_unlabelled for stage in prepared.stages):
        return []
    return [f"the method '{prepared.run.method}' has no use for unlabelled images: none were seen"]


def _few_steps(run: Run, task: Task) -> list[str]:
    images = len(task.train), 0 if task.unlabelled is None else len(task.unlabelled)
    steps = run.epochs_over(*images) * run.steps_over(*images)
    if steps >= _FEW_STEPS:
        return []
    return [f"{steps} steps of optimisation are few; more --epochs or a smaller --batch-size should help"]


def channel_statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images ``(N, 3, S, S)``, on the scale [0, 1]."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for block in pixels.split(SCORING_BATCH):
        counts += torch.stack([torch.bincount(block[:, channel].flatten(), minlength=256) for channel in range(3)])
    levels = torch.arange(256) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    return mean.tolist(), variance.sqrt().clamp(min=1 / 255).tolist()  # a channel without contrast is left as it is


def _by_class(task: Task, accuracies: list[float]) -> dict[str, float | None]:
    # JSON knows no NaN: a class without test images has no accuracy.
    return {name: None if a != a else a for name, a in zip(task.classes, accuracies, strict=True)}


def versions() -> dict[str, str]:
    """Say which versions of the software that decides results are at work."""
    return {name: version(name) for name in ("refilled", "torch", "timm")} | {"python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """Name the hardware of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
