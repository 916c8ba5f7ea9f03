"""Start, resume and execute a run."""

import logging
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from refilled.config import WHERE, Run, names_in, what
from refilled.data import Task, task_stamp
from refilled.errors import RunError
from refilled.models import save_model
from refilled.runs.choice import is_measured, settle_precision
from refilled.runs.determinism import give_memory_back
from refilled.runs.examination import verdict_on
from refilled.runs.folder import RunFolder
from refilled.runs.images import ImageRecord
from refilled.runs.prepared import Prepared, load_task_of, resolve, runs_code, with_absolute_paths
from refilled.runs.result import Result
from refilled.runs.scoring import measure
from refilled.runs.teacher_caches import cache_for, fabric_of, gap_of
from refilled.runs.teachers import brought_by_each, with_gap
from refilled.training.distributed import ALONE, World, joined
from refilled.training.journal import RunJournal
from refilled.training.loop import fit
from refilled.training.progress import Display
from refilled.training.teacher_cache import fingerprint

NAMED = ("task", "teacher", "student", "method")
"""Fields that may be given again when a run is resumed: their files may have moved, or are Python files."""

After = Callable[[Prepared, Path], None]
"""Called by rank 0 with a run that has just finished, while its images and networks are still in memory."""

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would log each precision plugin


def distill(
    run: Run,
    folder: Path,
    *,
    display: Display | None = None,
    seconds_between_saves: float = 60.0,
    after: After | None = None,
) -> Result:
    """Train a student as the run specifies, test it once, and write everything to a new folder.

    Processes that torchrun started train it together; rank 0 writes, and each returns the result.

    Raises:
        RunError: The folder already holds a run; it is left as it is.
        RefilledError: Something in the run cannot work. This is found before training where possible.
    """
    run_folder = RunFolder(folder)
    with joined() as world, ExitStack() as held:
        world.lead(run_folder.refuse_used)
        prepared = Prepared(resolve(run))  # raises errors before anything is written
        settle_precision(run, prepared, world)
        world.lead(lambda: held.enter_context(run_folder.new()))
        return begin(prepared, run_folder, display or Display(), seconds_between_saves, world, after)


def check(run: Run) -> None:
    """Find and check everything that a run names, without training.

    Raises:
        RefilledError: Something in the run cannot work, as far as this can be found before training.
    """
    Prepared(resolve(run))


def resume(
    folder: Path,
    *,
    where: Mapping[str, Any] | None = None,
    named: Mapping[str, str | Sequence[str]] | None = None,
    display: Display | None = None,
    seconds_between_saves: float = 60.0,
    after: After | None = None,
) -> Result:
    """Resume an interrupted run, exactly as if it had not been interrupted; a finished one returns its result.

    Processes that torchrun started resume it together. With another number of processes, or on another machine, the
    result is equal up to rounding.

    A Python file that only the run's folder names is not executed; it must be named again.

    Args:
        folder: The run's folder.
        where: New values of fields in :data:`~refilled.config.WHERE`, which are recorded.
        named: Values of fields in :data:`NAMED`. Each must name what the run was started with; its path may have
            changed.
        display: Where progress is shown.
        seconds_between_saves: Seconds between two saves of the state.
        after: See :data:`After`.

    Raises:
        RunError: There is no run in the folder, another process uses it, ``where`` names something else or a device
            that cannot be used here, the images have changed, or a Python file was not named again.
        CheckpointError: Its saved states are damaged.
    """
    if others := sorted(set(where or ()) - set(WHERE)):
        raise RunError(f"cannot change {', '.join(others)} when resuming; only {', '.join(WHERE)} may differ")
    run_folder = RunFolder(folder)
    with joined() as world, ExitStack() as held:
        world.lead(lambda: held.enter_context(run_folder.held()))
        return _resume(run_folder, where or {}, named or {}, display or Display(), seconds_between_saves, world, after)


def complete(
    run: Run,
    folder: Path,
    *,
    display: Display | None = None,
    seconds_between_saves: float = 60.0,
    after: After | None = None,
) -> Result:
    """Start a run, or resume it; return the result of a finished one.

    The precision ``auto`` is that of the processor and is not measured, so that the runs of a comparison compute alike.

    If several processes call this for the same run in the same folder, one of them executes the run. Another machine
    may finish a run, also if its images and its teacher have other paths there. The images are compared with the
    record of the run.

    Raises:
        InUseError: Another process uses the folder.
        RunError: The folder holds another run, a run on other images, or something that is not a run.
        RefilledError: Something in the run cannot work.
    """
    display, run_folder = display or Display(), RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not run_folder.begun:
        with run_folder.new():
            return begin(Prepared(resolve(run)), run_folder, display, seconds_between_saves, after=after)
    with run_folder.held():
        wanted = with_absolute_paths(resolve(run))
        if is_measured(run, wanted):  # as in a run that was begun by itself
            wanted = replace(wanted, precision=run_folder.run().precision)
        _refuse_another(run_folder, wanted)
        named = {name: value for name in NAMED if (value := getattr(wanted, name)) is not None}
        if run_folder.finished:
            refuse_other_images(run_folder, wanted)
            run_folder.write(replace(run_folder.run(), **dict[str, Any](named)))  # the present path of its teacher
        where = {name: getattr(wanted, name) for name in WHERE}
        return _resume(run_folder, where, named, display, seconds_between_saves, after=after)


def begin(
    prepared: Prepared,
    folder: RunFolder,
    display: Display,
    seconds_between_saves: float,
    world: World = ALONE,
    after: After | None = None,
) -> Result:
    """Execute a run in an empty folder that this process holds."""
    world.lead(lambda: _record_images(prepared, folder))
    world.lead(lambda: folder.write(prepared.run))
    return carry_out(prepared, folder, display, seconds_between_saves, world, after)


def refuse_other_images(folder: RunFolder, run: Run) -> None:
    """Refuse a finished run if its images differ from those that a configuration names now.

    The images are loaded only if their files have changed since the last check.

    Raises:
        RunError: They differ.
    """
    record = ImageRecord.load(folder.path)
    if record is None:
        return
    stamp = task_stamp(run.task, _path(run.data_root))
    if stamp == record.stamp:
        return
    _refuse_changed(record, load_task_of(run), folder)
    replace(record, stamp=stamp).save(folder.path)


def carry_out(
    prepared: Prepared,
    folder: RunFolder,
    display: Display,
    seconds_between_saves: float,
    world: World = ALONE,
    after: After | None = None,
) -> Result:
    """Train from the newest saved state, or from the beginning, and score."""
    run, teachers = prepared.run, prepared.teachers
    fabric = fabric_of(run, world)
    prepared.task = task = prepared.task.near(fabric.device)
    if world.size > 1:
        models = {"teacher": list(map(fingerprint, teachers)), "student": fingerprint(prepared.student)}
        world.check_same(images=task.seen_fingerprint, **models)
    journal = RunJournal(folder.path, display, seconds_between_saves, world)
    if teachers:
        for teacher in teachers:
            teacher.to(fabric.device)
        verdict = world.lead(lambda: verdict_on(prepared, folder.path, fabric.device))
        prepared.notes += verdict.notes
        if any(verdict.ignores):
            prepared.ignore_teachers(verdict.ignores)
        prepared.label_information = tuple(known for _, known in verdict.of_each)
    student = prepared.student
    for note in prepared.notes:
        display.message(f"note: {note}")
    for line in brought_by_each(prepared):
        display.message(line)
    try:
        if prepared.readout is None:
            caches = [cache_for(prepared, number, fabric, display) for number in range(len(teachers))]
            with journal.catching_signals():
                fit(student, teachers, task, prepared.stages, run, fabric, journal, caches, world, run.cuda_graphs)
            give_memory_back()  # scoring allocates blocks of other sizes
            result = measure(prepared, folder, journal.seconds, world, journal.warnings)
            for number, cache in enumerate(caches):
                if cache is not None:
                    result = with_gap(result, number, gap_of(prepared, number, cache, fabric))
        else:
            journal.restore()  # restores no state, but creates the log
            student.to(fabric.device)
            result = replace(measure(prepared, folder, 0.0, world), seconds=journal.seconds)
    finally:
        display.close()
    return world.lead(lambda: _conclude(prepared, folder, result, after))


def _conclude(prepared: Prepared, folder: RunFolder, result: Result, after: After | None) -> Result:
    if prepared.readout is None:
        save_model(prepared.student, folder.path)
    result.save(folder.path)
    folder.finish()
    if after is not None:
        after(prepared, folder.path)
    return result


def _resume(
    folder: RunFolder,
    where: Mapping[str, Any],
    named: Mapping[str, str | Sequence[str]],
    display: Display,
    seconds_between_saves: float,
    world: World = ALONE,
    after: After | None = None,
) -> Result:
    finished = world.lead(lambda: Result.load(folder.path) if folder.finished else None)
    if finished is not None:
        return finished
    prepared = Prepared(world.lead(lambda: _load_unfinished(folder, where, named)))
    world.lead(lambda: _hold_against_record(prepared, folder))
    if where or named:
        world.lead(lambda: folder.write(prepared.run))
    return carry_out(prepared, folder, display, seconds_between_saves, world, after)


def _load_unfinished(folder: RunFolder, where: Mapping[str, Any], named: Mapping[str, str | Sequence[str]]) -> Run:
    run = resolve(_with_named(replace(folder.run(), **where), folder, named))
    recorded = folder.recorded()
    new = _unrecorded(_to_record(run), recorded)
    if new:
        raise RunError(
            f"{folder.path} was started by a version of refilled or of its method without {', '.join(new)}; resume "
            "with that version, or start again with --overwrite"
        )
    return run


def _unrecorded(wanted: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    settings = wanted["settings"].keys() - recorded.get("settings", {}).keys()
    return sorted((what(wanted).keys() - recorded.keys()) | settings)


def _with_named(run: Run, folder: RunFolder, named: Mapping[str, str | Sequence[str]]) -> Run:
    """Return the run with the fields that were named again; refuse a Python file that was not named again."""
    for name in NAMED:
        recorded = getattr(run, name)
        if name not in named:
            if runs_code(recorded):
                again = " ".join(f"--{name} {each}" for each in names_in(recorded))
                raise RunError(
                    f"the run in {folder.path} names a Python file, which resuming would execute. If you trust it, "
                    f"name it yourself: --resume {folder.path} {again}"
                )
        elif recorded is None or _last_parts(recorded) != _last_parts(named[name]):
            begun, asked = (", ".join(names_in(value)) or None for value in (recorded, named[name]))
            raise RunError(f"the run in {folder.path} was started with {name} {begun}, not {asked}; leave out --{name}")
    return replace(run, **dict[str, Any](named))


def _last_parts(names: str | Sequence[str]) -> list[str]:
    return [Path(name).name for name in names_in(names)]


def _refuse_another(folder: RunFolder, wanted: Run) -> None:
    """Refuse a folder that holds another run. Runs that differ only in paths are the same."""
    recorded, asked = folder.recorded(), _to_record(wanted)
    if _with_moved(recorded, asked) != what(asked):
        raise RunError(f"{folder.path} holds a run of another configuration; remove it or choose another folder")


def _with_moved(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record, with the present paths of files that have moved and kept their names."""
    moved = {
        name: asked[name]
        for name in NAMED
        if name in recorded and name in asked and _same_elsewhere(recorded[name], asked[name])
    }
    return what({**recorded, **moved})


def _same_elsewhere(recorded: str | Sequence[str], asked: str | Sequence[str]) -> bool:
    if recorded == asked:
        return True
    there = [Path(name.rpartition(":")[0] if runs_code(name) else name) for name in names_in(recorded)]
    pairs = zip(there, names_in(recorded), names_in(asked), strict=False)
    return _last_parts(recorded) == _last_parts(asked) and all(a == b or not path.exists() for path, a, b in pairs)


def _to_record(run: Run) -> dict[str, Any]:
    """Return the record of a resolved run. It has all fields, so a field that a record lacks did not exist yet."""
    return tomllib.loads(run.to_toml())


def _record_images(prepared: Prepared, folder: RunFolder) -> None:
    run = prepared.run
    ImageRecord.of(prepared.task, task_stamp(run.task, _path(run.data_root))).save(folder.path)


def _hold_against_record(prepared: Prepared, folder: RunFolder) -> None:
    record = ImageRecord.load(folder.path)
    if record is None:  # the run was stopped before anything was trained
        _record_images(prepared, folder)
    else:
        _refuse_changed(record, prepared.task, folder)


def _refuse_changed(record: ImageRecord, task: Task, folder: RunFolder) -> None:
    changes = record.changes(task)
    if changes:
        raise RunError(
            f"the images of {task.name} are not those that the run in {folder.path} was started with: {changes}. "
            "Restore them, or choose another --out for a run on the new images"
        )


def _path(data_root: str | None) -> Path | None:
    return None if data_root is None else Path(data_root)
