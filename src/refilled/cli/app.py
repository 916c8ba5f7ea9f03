"""The command line: thin, one library call a command, and errors for people.

Heavy imports stand inside the commands, so that help and mistakes answer at once.
"""

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refilled.config import WHERE, FewShotRun, MetaRun, Recipe, Run
from refilled.errors import RefilledError, RunError, unknown
from refilled.presets import PRESETS, with_preset

if TYPE_CHECKING:
    from refilled.compare.comparison import Comparison
    from refilled.grid import executors
    from refilled.runs.experiment import Result
    from refilled.training.progress import Display
    from refilled.training.teacher_cache import TeacherCache
    from refilled.tuning.student import Tuned

_LEAST_STEPS = 1000
"""Of a run that says nothing of epochs: no number of them suits a handful of images and thousands alike."""

app = typer.Typer(
    help="Distil a strong vision model trained on other classes into a small model for your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
err = Console(stderr=True)

Folder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Executor = Annotated[
    str, typer.Option(help="local: processes; ray: Ray, on this machine or on the cluster at $RAY_ADDRESS.")
]
Cpus = Annotated[float, typer.Option(help="Processor cores a run or process, for Ray.", min=0.0)]
Gpus = Annotated[float, typer.Option(help="Accelerators likewise; 0.5 lets two share one.", min=0.0)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run is and what it will cost, in time and memory, and stop.")
]
Ranks = Annotated[int, typer.Option(help="With --dry-run: so many processes under torchrun.", min=1)]
Preset = Annotated[str | None, typer.Option(help=f"One of: {', '.join(PRESETS)}.", show_default=False)]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder that holds the data sets; else $REFILLED_DATA.", show_default=False)
]

_STUDENT_HELP = "Architecture ('refilled list models'), or weights to start from: a run's folder, or architecture:FILE."


def _run_flags(*without: str, of: type = Run) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each field of a configuration, with the help that its docstring holds."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [_flag(f, of) for f in fields(of) if f.name not in without and f.name not in {p.name for p in own}]
        signature = inspect.Signature([*own, *flags])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def _flag(setting: Field[Any], of: type) -> inspect.Parameter:
    """Make the flag of a field; a flag that is not given is None, so that presets can stand below it."""
    hint = get_type_hints(of)[setting.name]
    default = setting.default if setting.default is not MISSING else None
    description = _descriptions(of)[setting.name] + (f" [default: {default}]" if default is not None else "")
    panel = "Training" if of is Run and setting.name in {f.name for f in fields(Recipe)} else "Data, models, machine"
    option = typer.Option(help=escape(description), show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, option]
    )


def _descriptions(of: type = Run) -> dict[str, str]:
    text = "\n".join(base.__doc__ or "" for base in reversed(of.__mro__[:-1]))
    found = re.findall(r"^ +(\w+): (.+(?:\n {12,}.+)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("``", "'") for name, text in found}


@app.command()
@_run_flags("teacher", "method", "settings", "teacher_mean", "teacher_std", "teacher_size", "student")
def train(
    task: Annotated[str, typer.Argument(help="A task, as digits:0-4, or a folder of images.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--student",
            help="Architecture ('refilled list models'), or weights to start from: a run's folder, architecture:FILE.",
        ),
    ] = "wrn_16_1",
    out: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    preset: Preset = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a model from labels alone: a teacher, or a student without one."""
    run = _configure(preset, {"task": task, "student": model, **flags})
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, quiet, as_json)


@app.command()
@_run_flags("task", "settings")
def distill(
    context: typer.Context,
    task: Annotated[
        str | None, typer.Argument(help="A task, as digits:5-9, or a folder of images.", show_default=False)
    ] = None,
    teacher: Annotated[str | None, typer.Option(help=escape(_descriptions()["teacher"]), show_default=False)] = None,
    student: Annotated[
        str,
        typer.Option(
            help="Architecture ('refilled list models'), or weights to start from: a run's folder, architecture:FILE."
        ),
    ] = "wrn_16_1",
    method: Annotated[
        str, typer.Option(help="A method ('refilled list methods'), or a file that defines one.")
    ] = "refilled",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    preset: Preset = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder; nothing else is needed. --device and the like move it.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a student with the help of a teacher whose classes may be others."""
    if resume is not None:
        _resume(context, resume, quiet, as_json)
        return
    if task is None:
        raise RunError("name a task or a folder of images, as in: refilled distill photos/ --teacher timm/resnet50")
    settings = dict(_key_value(text) for text in set_ or ())
    named = {"task": task, "teacher": teacher, "student": student, "method": method, "settings": settings}
    run = _configure(preset, {**named, **flags})
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, quiet, as_json)


@app.command()
def evaluate(
    folder: Folder,
    task: Annotated[str | None, typer.Argument(help="Another task with the same classes.", show_default=False)] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Score a student on the test part of its task, or of another one."""
    from refilled.runs.experiment import evaluate as score

    result = score(folder, task, data_root)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("class", "accuracy")
    for name, accuracy in result["class_accuracies"].items():
        table.add_row(escape(_printable(name)), "no images" if accuracy is None else f"{accuracy:.1f} %")
    table.add_section()
    table.add_row(f"all {result['images']} images", f"{result['accuracy']:.2f} %")
    console.print(table)


@app.command()
def predict(
    folder: Folder,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    top: Annotated[int, typer.Option(help="How many classes to name for each image.", min=1)] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row an image, with all probabilities.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object an image.")] = False,
) -> None:
    """Name the class of images, with probabilities."""
    from refilled.runs.experiment import classify

    predictions, unreadable = classify(folder, images)
    if as_csv:
        _print_csv(predictions)
    elif as_json:
        for image, probabilities in predictions:
            best = max(probabilities, key=probabilities.__getitem__)
            print(json.dumps({"image": str(image), "class": best, "probabilities": probabilities}))
    else:
        table = Table("image", "class", "probability")
        for image, probabilities in predictions:
            ranked = sorted(probabilities.items(), key=lambda item: -item[1])[:top]
            for row, (name, probability) in enumerate(ranked):
                shown = "" if row else escape(_printable(str(image)))
                table.add_row(shown, escape(_printable(name)), f"{100 * probability:.1f} %")
        console.print(table)
    for image, reason in unreadable:
        line = f"left out {_printable(str(image))}: {_printable(reason)}"
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    if unreadable:
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, fewshot, models or datasets", show_default=False)],
) -> None:
    """List the methods or few-shot methods with their parameters, the models, or the data sets."""
    kinds = {"methods": _methods, "fewshot": _few_shot_methods, "models": _models, "datasets": _datasets}
    if what not in kinds:
        raise RunError(unknown("list", what, kinds))
    console.print(kinds[what]())


@app.command()
@_run_flags("task", "method", "settings", "seed")
def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="A task or a folder of images; or a comparison written down, FILE.toml.", show_default=False
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names with commas, the first the baseline; METHOD:PRESET takes the preset's settings of the method. "
            "[default: vanilla,rkd,refilled,refilled:good, or with --preset that one]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 3,
    student: Annotated[
        str,
        typer.Option(
            help="Architecture ('refilled list models'), or weights to start from: a run's folder, architecture:FILE."
        ),
    ] = "wrn_16_1",
    out: Annotated[Path | None, typer.Option(help="Folder for the runs and the page.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; best with --threads 1.", min=1)] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    preset: Preset = None,
    **flags: Any,
) -> None:
    """Find out whether the teacher helps: several methods and seeds at equal cost, a table and a page."""
    from refilled.compare.comparison import Comparison
    from refilled.grid.executors import find_executor

    if task.endswith(".toml"):
        comparison = Comparison.from_toml(_read(Path(task)))
        out = out or Path("runs") / Path(task).stem
    else:
        # Of a preset, all rows share how they are trained; the settings are for the row that names it.
        run = replace(_configure(preset, {"task": task, "student": student, **flags}), settings={})
        names = methods or f"vanilla,rkd,refilled,refilled:{preset or 'good'}"
        rows = {name: _row(name) for name in names.split(",")}
        comparison = Comparison(f"{task}: does the teacher help?", run, rows, range(seeds))
        out = out or Path("runs") / _run_name(run)
    _compare(comparison, out, jobs, find_executor(executor, cpus, gpus))


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method; may be repeated."),
]


@app.command()
@_run_flags("settings", of=FewShotRun)
def fewshot(
    data: Annotated[str, typer.Option(help=escape(_descriptions(FewShotRun)["data"]), show_default=False)],
    set_: Set = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH[:log]|A,B,C", help="Tune it on the validation classes first; may be repeated."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Settings to try when tuning.", min=1)] = 30,
    tune_episodes: Annotated[int, typer.Option(help="Tasks to try each on.", min=1)] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder for the test.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the tasks, one thread each.", min=1)] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Test a few-shot method on many tasks of unseen classes; the same command goes on with an interrupted test."""
    from refilled.fewshot.evaluation import evaluate_few_shot
    from refilled.grid.executors import find_executor
    from refilled.grid.sharing import shared_testing
    from refilled.tuning.few_shot import tune as search

    given = {name: value for name, value in flags.items() if value is not None}
    elsewhere = jobs > 1 or executor != "local"
    testing = shared_testing(jobs, find_executor(executor, cpus, gpus)) if elsewhere else None
    if elsewhere:
        given = {"threads": 1, **given}
    run = FewShotRun(data=data, settings=dict(_key_value(text) for text in set_ or ()), **given)
    folder = out or Path("runs") / _few_shot_name(run.data, run.method, run.n_way, run.n_shot, run.seed)
    say = _silent if quiet or as_json else _say
    if tune:
        storage = folder.with_name(f"{folder.name}.tuning")
        settings = search(
            run,
            dict(_key_value(text) for text in tune),
            trials=trials,
            n_episodes=tune_episodes,
            storage=storage,
            progress=say,
        )
        run = replace(run, settings=settings)
    result = evaluate_few_shot(run, folder, lambda *reached: say(_reached(run.n_episodes, *reached)), testing, jobs)
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    table = Table(show_header=False)
    spread = "" if result.interval is None else f" ± {result.interval:.2f}"
    table.add_row("accuracy", f"{result.accuracy:.2f}{spread} % over {result.n_episodes} tasks, 95 % interval")
    table.add_row("tasks", f"{run.n_way}-way {run.n_shot}-shot, {result.n_query} queries a class, seed {run.seed}")
    table.add_row(
        "images", escape(f"{result.data['pool']}: {result.data['images']} of {result.data['classes']} classes")
    )
    table.add_row("speed", f"{result.tasks_per_second:.3g} tasks a second")
    for note in result.data["notes"]:
        table.add_row("note", note)
    console.print(table)
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@_run_flags("settings", of=MetaRun)
def meta_train(
    data: Annotated[str, typer.Option(help=escape(_descriptions(MetaRun)["data"]), show_default=False)],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Meta-train ProtoNet, FEAT or MAML on seen classes; the folder is then a --teacher of 'refilled fewshot'."""
    from refilled.fewshot.meta_training import meta_train as train
    from refilled.training.journal import Interrupted

    given = {name: value for name, value in flags.items() if value is not None}
    run = MetaRun(data=data, settings=dict(_key_value(text) for text in set_ or ()), **given)
    folder = out or Path("runs") / f"meta-{_few_shot_name(run.data, run.method, run.n_way, run.n_shot, run.seed)}"
    try:
        result = train(run, folder, display=_display(quiet or as_json))
    except Interrupted as interruption:
        err.print("interrupted; the state is saved. The same command goes on with it", markup=False)
        sys.exit(128 + interruption.number)
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    spread = "" if result.interval is None else f" ± {result.interval:.2f}"
    console.print(f"best on validation tasks: {result.val_accuracy:.2f}{spread} %, epoch {result.best_epoch}")
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@_run_flags("task", "settings", "score")
def tune(
    task: Annotated[str, typer.Argument(help="A task, as digits:5-9, or a folder of images.", show_default=False)],
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=LOW..HIGH[:log]|A,B,C",
            help="What to try for a parameter of the method, or for a flag of training as lr; may be repeated.",
            show_default=False,
        ),
    ],
    teacher: Annotated[str | None, typer.Option(help=escape(_descriptions()["teacher"]), show_default=False)] = None,
    student: Annotated[
        str,
        typer.Option(
            help="Architecture ('refilled list models'), or weights to start from: a run's folder, architecture:FILE."
        ),
    ] = "wrn_16_1",
    method: Annotated[
        str, typer.Option(help="A method ('refilled list methods'), or a file that defines one.")
    ] = "refilled",
    trials: Annotated[int, typer.Option(help="Trials in all; more of them go on from a folder.", min=1)] = 20,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter that stays as it is; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the trials.", show_default=False)] = None,
    preset: Preset = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Choose parameters on held-out training images, then train on all of them and look at the test images once.

    The same command goes on where it was interrupted; several of them, with the same --out, share the work.
    """
    from refilled.training.journal import Interrupted
    from refilled.tuning.student import tune as search_and_train

    settings = dict(_key_value(text) for text in set_ or ())
    named = {"task": task, "teacher": teacher, "student": student, "method": method, "settings": settings}
    run = _configure(preset, {**named, **flags})
    folder = out or Path("runs") / f"tune-{_run_name(run)}"
    try:
        tuned = search_and_train(run, dict(_key_value(text) for text in search), trials, folder, _tell_trial)
    except Interrupted as interruption:
        err.print("interrupted; the state is saved, and the same command goes on", markup=False)
        sys.exit(128 + interruption.number)
    if tuned is None:
        err.print("other processes are still at some trials; the last of them trains on all images", markup=False)
    elif as_json:
        found = {"values": tuned.values, "val_accuracy": tuned.val_accuracy, "accuracy": tuned.result.accuracy}
        print(json.dumps({**found, "run": str(tuned.folder)}))
    else:
        _print_tuned(tuned)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the page.")] = Path("runs/demo"),
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 2,
) -> None:
    """Show the whole on digits: a teacher of 0-4 for students of 5-9. Takes about a minute."""
    from importlib.resources import files

    from refilled.compare.comparison import Comparison
    from refilled.grid.executors import processes

    console.print("A teacher of the digits 0-4 and students of 5-9, which see 10 images of each; all at equal cost.")
    comparison = Comparison.from_toml((files("refilled.compare") / "demo.toml").read_text(encoding="utf-8"))
    _compare(comparison, out, jobs, processes)


cache = typer.Typer(help="Teachers' embeddings on disk, for runs with --views.", no_args_is_help=True)
app.add_typer(cache, name="cache")

_NOT_CACHED = {f.name for f in fields(Recipe)} - {
    "augmentation",
    "mixup",
    "cutmix",
    "precision",
    "seed",
}  # no part of an embedding


@cache.command()
@_run_flags("student", "method", "settings", "score", "pretrained", *_NOT_CACHED)
def build(
    task: Annotated[str, typer.Argument(help="A task, as digits:5-9, or a folder of images.", show_default=False)],
    teacher: Annotated[str, typer.Option(help=escape(_descriptions()["teacher"]), show_default=False)],
    views: Annotated[int, typer.Option(help="Augmented views of each image.", min=1, show_default=False)],
    jobs: Annotated[int, typer.Option(help="Processes that share the work.", min=1)] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
    **flags: Any,
) -> None:
    """Embed views of a task's images by a teacher, for all runs that take the same; several commands share the work."""
    from refilled.grid.cache_building import build_cache_together
    from refilled.grid.executors import find_executor
    from refilled.runs.experiment import build_cache

    run = _configure(None, {"task": task, "teacher": teacher, "views": views, **flags})
    if jobs == 1 and executor == "local":
        _print_cache(build_cache(run, say=_silent if quiet else _say))
    else:
        _print_cache(build_cache_together(run, jobs, find_executor(executor, cpus, gpus)))


@cache.command()
def info() -> None:
    """List the caches of this machine, and what is in them."""
    for found in _open_caches():
        _print_cache(found)


@cache.command()
def verify() -> None:
    """Read all caches of this machine and say what is damaged or missing; a run or 'cache build' mends it."""
    damaged = 0
    for found in _open_caches():
        problems = found.problems()
        damaged += len(problems)
        for shard, problem in problems.items():
            _say(f"{found.path(shard)}: {problem}")
        whole = found.contents.shards - len(problems)
        console.print(f"{found.folder.name}: {whole} of {found.contents.shards} whole", highlight=False)
    if damaged:
        raise typer.Exit(1)


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="'list', or a table or figure of the paper: table1, s1, figure3 ...")],
    scale: Annotated[str, typer.Option(help="smoke (minutes), mini (hours) or paper.")] = "smoke",
    recipe: Annotated[str, typer.Option(help="How networks are optimised: paper2020 or crd240.")] = "paper2020",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW/COLUMN", help="A cell, ROW alone or /COLUMN alone; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each cell.", min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    out: Annotated[Path, typer.Option(help="Folder that all tables share.")] = Path("runs/reproduce"),
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how long it would take, and stop.")] = False,
) -> None:
    """Reproduce a table or figure of the paper beside the published numbers. Rerun to fill in missing cells."""
    from refilled.grid.executors import find_executor
    from refilled.paper.cells import Choice
    from refilled.paper.fill import estimate_table, fill, find_table

    if table == "list":
        console.print(_tables())
        return
    choice = Choice(scale, recipe, tuple(range(seeds)), tuple(only or ()), data_root, device)
    if dry_run:
        for line in estimate_table(find_table(table), choice, out, jobs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    outcome = fill(find_table(table), choice, out, jobs, console, find_executor(executor, cpus, gpus))
    console.print(f"page: {outcome.page}", markup=False, highlight=False, soft_wrap=True)
    if outcome.failures:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a known error becomes one red line, and ``--debug`` shows where it came from."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if _rank() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 alone prints results
    try:
        _refuse_torchrun(arguments)
        app(arguments, prog_name="refilled", standalone_mode=True)
    except RefilledError as error:
        if debug:
            raise
        if _first_to_tell(str(error)):
            err.print(f"[red]error:[/red] {escape(_printable(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: no further complaint
        sys.exit(141)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _refuse_torchrun(arguments: list[str]) -> None:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if _processes() > 1 and command not in (None, "train", "distill"):
        raise RunError(
            f"torchrun is for 'refilled train' and 'refilled distill', one run in several processes; start 'refilled "
            f"{command}' once, without torchrun. Commands that carry out many runs share them among processes by --jobs"
        )


def _first_to_tell(message: str) -> bool:
    if _processes() == 1:
        return True
    from refilled.training.distributed import first_to_tell

    return first_to_tell(message)


def _configure(preset: str | None, values: dict[str, Any]) -> Run:
    given = with_preset(preset, {name: value for name, value in values.items() if value is not None})
    return Run(**given if "epochs" in given else {"least_steps": _LEAST_STEPS, **given})


def _compare(comparison: "Comparison", folder: Path, jobs: int, executor: "executors.Executor") -> None:
    from refilled.compare.comparison import compare as carry_out

    page = carry_out(comparison, folder, jobs, console, executor)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _row(name: str) -> dict[str, Any]:
    method, _, preset = name.partition(":")
    return {"method": method, "settings": with_preset(preset or None, {"method": method}).get("settings", {})}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _key_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RunError(f"'{text}' must be KEY=VALUE")
    return name.strip().replace("-", "_"), value.strip()


def _distill(run: Run, folder: Path | None, overwrite: bool, quiet: bool, as_json: bool) -> None:
    from refilled.runs import experiment

    folder = folder or Path("runs") / _run_name(run)
    if overwrite and _rank() == 0:
        experiment.overwrite(folder)
    _carry_out(lambda display: experiment.distill(run, folder, display=display), folder, quiet or as_json, as_json)


def _forecast(run: Run, ranks: int, as_json: bool) -> None:
    from refilled.cost.run import forecast

    found = forecast(run, ranks)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    console.print(found.run.to_toml(), end="", markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    for heading, text in found.rows():
        table.add_row(heading, escape(text))
    console.print(table)


def _resume(context: typer.Context, folder: Path, quiet: bool, as_json: bool) -> None:
    from refilled.runs import experiment

    given = _given(context)
    if others := [flag for name, flag in given.items() if name not in (*WHERE, "resume", "quiet", "as_json")]:
        movable = ", ".join(f"--{name.replace('_', '-')}" for name in WHERE)
        raise RunError(
            f"--resume goes on with a run as it was begun; leave out {', '.join(others)}. What may change is: {movable}"
        )
    where = {name: context.params[name] for name in WHERE if name in given}
    _carry_out(
        lambda display: experiment.resume(folder, where=where, display=display), folder, quiet or as_json, as_json
    )


def _given(context: typer.Context) -> dict[str, str]:
    """Return how each parameter that stands on the command line is written there."""
    sources = {p: context.get_parameter_source(p.name) for p in context.command.params if p.name}
    given = [p for p, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return {str(p.name): p.opts[-1] if p.param_type_name == "option" else f"the {p.name}" for p in given}


def _carry_out(call: "Callable[[Display], Result]", folder: Path, quiet: bool, as_json: bool) -> None:
    from refilled.training.journal import Interrupted

    try:
        result = call(_display(quiet))
    except Interrupted as interruption:
        command = shlex.join(["refilled", "distill", "--resume", str(folder)])
        if _rank() == 0:
            err.print(f"interrupted; the state is saved. Go on with: {command}", markup=False, soft_wrap=True)
        sys.exit(128 + interruption.number)
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    _print_result(result, folder)


def _display(quiet: bool) -> "Display":
    from refilled.training.progress import Bars, Display, Lines

    return Display() if quiet or _rank() > 0 else Bars(err) if err.is_terminal else Lines(err)


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _silent(text: str) -> None:
    pass


def _reached(all_: int, done: int, accuracy: float, interval: float | None) -> str:
    return f"{done}/{all_} tasks  {accuracy:.2f}" + ("" if interval is None else f" ± {interval:.2f}") + " %"


def _few_shot_name(data: str, method: str, n_way: int, n_shot: int, seed: int) -> str:
    parts = [Path(data).name, Path(method).stem, f"{n_way}way{n_shot}shot", f"s{seed}"]
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)


def _print_result(result: "Result", folder: Path) -> None:
    images = result.data["images"]
    table = Table(show_header=False)
    part = result.data.get("scored", "test")
    when = ", after the last epoch" if (folder / "model.json").exists() else ""  # some methods train nothing
    table.add_row("accuracy", f"{result.accuracy:.2f} % of {images[part]} {part} images{when}")
    table.add_row("nearest class mean", f"{result.ncm_accuracy:.2f} %")
    for name, measures in result.stages.items():
        table.add_row(f"  after stage {name}", f"{measures['ncm_accuracy']:.2f} %")
    table.add_row("trained on", f"{images['train']} images of {len(result.class_accuracies)} classes")
    cached = (result.teacher or {}).get("cache")
    if cached:
        accuracies = f"{cached['cached_accuracy']:.2f} % cached, {cached['live_accuracy']:.2f} % live"
        difference = f"largest difference {cached['largest_difference']:.1g} of the root mean square"
        table.add_row(
            "teacher cache", f"{accuracies}, of {cached['images']} training images by class mean; {difference}"
        )
    table.add_row("network", f"{result.parameters:,} parameters")
    table.add_row("time", f"{result.seconds / 60:.1f} minutes, {result.hardware['threads']} threads")
    if result.data["skipped"]:
        table.add_row("left out", f"{len(result.data['skipped'])} unreadable images; see result.json")
    for note in result.data["notes"]:
        table.add_row("note", escape(_printable(note)))
    console.print(table)
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


def _open_caches() -> list["TeacherCache"]:
    from refilled.runs.experiment import list_caches
    from refilled.training.teacher_cache import TeacherCache

    opened = []
    for folder in list_caches():
        try:
            opened.append(TeacherCache.open(folder))
        except RunError as error:  # of an earlier version, perhaps; the others can still be shown
            _say(str(error))
    return opened


def _print_cache(cache: "TeacherCache") -> None:
    contents, (teacher, task) = cache.contents, cache.of
    shape = f"{contents.images:,} images x {contents.views} views x {contents.embedding_dim} numbers"
    made = f"{cache.shards_on_disk()} of {contents.shards} shards, {cache.size / 2**20:,.1f} MB"
    lines = cache.folder.name, f"  {shape}, {made}", f"  of {teacher}, in {contents.precision}", f"  on {task}"
    console.print("\n".join(map(_printable, lines)), markup=False, highlight=False, soft_wrap=True)


def _tell_trial(number: int, values: Mapping[str, Any], accuracy: float | None) -> None:
    reached = "the loss exploded" if accuracy is None else f"{accuracy:.2f} % of held-out images"
    line = f"trial {number}: {_listed(values)}: {reached}"
    err.print(_printable(line), markup=False, highlight=False, soft_wrap=True)


def _print_tuned(tuned: "Tuned") -> None:
    images = tuned.result.data["images"]
    table = Table(show_header=False)
    table.add_row("best values", escape(_printable(_listed(tuned.values))))
    table.add_row("held-out accuracy", f"{tuned.val_accuracy:.2f} %, the best of the trials")
    table.add_row("test accuracy", f"{tuned.result.accuracy:.2f} % of {images['test']} images")
    table.add_row("trained on", f"{images['train']} images, the held-out ones among them")
    console.print(table)
    console.print(f"run: {tuned.folder}", markup=False, highlight=False, soft_wrap=True)


def _listed(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _run_name(run: Run) -> str:
    task = Path(run.task).name if "/" in run.task else run.task
    parts = [task, run.student or "teacher", Path(run.method).stem, f"s{run.seed}"]
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)


def _print_csv(predictions: list[tuple[Path, dict[str, float]]]) -> None:
    import csv

    writer = csv.writer(sys.stdout)
    names = list(predictions[0][1]) if predictions else []
    writer.writerow(["image", "class", *map(_cell, names)])
    for image, probabilities in predictions:
        best = max(probabilities, key=probabilities.__getitem__)
        writer.writerow([_cell(str(image)), _cell(best), *(f"{p:.6f}" for p in probabilities.values())])


def _cell(text: str) -> str:
    """Keep a spreadsheet from running a text that begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _printable(text: str) -> str:
    """Show control characters, escape sequences of a terminal among them, instead of sending them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _methods() -> Table:
    from refilled.methods import list_methods, load_method

    table = Table("method", "what it does", "parameters")
    for name in list_methods():
        method = load_method(name)
        table.add_row(name, method.summary, "\n".join(f"{k}={v}" for k, v in method.parameters.items()))
    return table


def _few_shot_methods() -> Table:
    from refilled.fewshot.methods import list_few_shot_methods, load_few_shot_method

    table = Table("few-shot method", "what it does", "parameters")
    for name in list_few_shot_methods():
        method = load_few_shot_method(name)
        table.add_row(name, method.summary, "\n".join(f"{k}={v}" for k, v in method.parameters.items()))
    return table


def _models() -> Table:
    from refilled.models import list_models

    table = Table("model", "what it is")
    for name, description in list_models():
        table.add_row(escape(name), escape(description))
    return table


def _tables() -> Table:
    from refilled.paper.tables import TABLES

    table = Table("name", "what it is", "rows x columns")
    for found in TABLES.values():
        table.add_row(found.name, escape(found.title), f"{len(found.rows)} x {len(found.columns)}")
    return table


def _datasets() -> Table:
    from refilled.data import list_datasets

    table = Table("task", "what it is")
    for name, description in list_datasets():
        table.add_row(escape(name), escape(description))
    return table
