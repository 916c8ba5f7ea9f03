"""Commands of few-shot learning: ``fewshot`` and ``meta-train``."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import (
    MOST_JOBS,
    AsJson,
    Cpus,
    Executor,
    Gpus,
    Out,
    Quiet,
    Set,
    descriptions,
    key_value,
    run_flags,
    up_to,
)
from refilled.cli.show import console, display, err, say, silent
from refilled.config import FewShotRun, MetaRun
from refilled.ranges import MOST
from refilled.words import count_of, printable


@run_flags("settings", of=FewShotRun)
def fewshot(
    data: Annotated[str, typer.Option(help=escape(descriptions(FewShotRun)["data"]), show_default=False)],
    set_: Set = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="Values to try for a parameter of the method, on the validation classes and before the test: "
            "KEY=A,B,C, KEY=LOW..HIGH or KEY=LOW..HIGH:log; may be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Number of settings to try with --tune.", min=1, callback=up_to(MOST))
    ] = 30,
    tune_episodes: Annotated[
        int, typer.Option(help="Number of tasks per setting with --tune.", min=1, callback=up_to(MOST))
    ] = 100,
    out: Out = None,
    jobs: Annotated[
        int,
        typer.Option(
            help="Number of processes that share the tasks, each with one thread.", min=1, callback=up_to(MOST_JOBS)
        ),
    ] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Test a few-shot method on many tasks of unseen classes.

    Repeat the command to resume an interrupted test.
    """
    from refilled.fewshot.evaluation import evaluate_few_shot
    from refilled.grid.executors import find_executor
    from refilled.grid.sharing import shared_testing
    from refilled.tuning.few_shot import tune as search

    given = {name: value for name, value in flags.items() if value is not None}
    elsewhere = jobs > 1 or executor != "local"
    testing = shared_testing(jobs, find_executor(executor, cpus, gpus)) if elsewhere else None
    if elsewhere:
        given = {"threads": 1, **given}
    run = FewShotRun(data=data, settings=dict(key_value(text) for text in set_ or ()), **given)
    folder = out or Path("runs") / _few_shot_name(run.data, run.method, run.n_way, run.n_shot, run.seed)
    tell = silent if quiet or as_json else say
    if tune:
        storage = folder.with_name(f"{folder.name}.tuning")
        settings = search(
            run,
            dict(key_value(text) for text in tune),
            trials=trials,
            n_episodes=tune_episodes,
            storage=storage,
            progress=tell,
        )
        run = replace(run, settings=settings)
    result = evaluate_few_shot(run, folder, lambda *reached: tell(_reached(run.n_episodes, *reached)), testing, jobs)
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    table = Table(show_header=False)
    spread = "" if result.interval is None else f" ± {result.interval:.2f}"
    tasks, queries = count_of(result.n_episodes, "task"), count_of(result.n_query, "query", "queries")
    table.add_row("accuracy", f"{result.accuracy:.2f}{spread} % over {tasks}, 95 % interval")
    table.add_row("tasks", f"{run.n_way}-way {run.n_shot}-shot, {queries} per class, seed {run.seed}")
    table.add_row(
        "images", escape(f"{result.data['pool']}: {result.data['images']} of {result.data['classes']} classes")
    )
    table.add_row("speed", f"{result.tasks_per_second:.3g} tasks per second")
    for note in result.data["notes"]:
        table.add_row("note", escape(printable(note)))
    console.print(table)
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


@run_flags("settings", of=MetaRun)
def meta_train(
    data: Annotated[str, typer.Option(help=escape(descriptions(MetaRun)["data"]), show_default=False)],
    set_: Set = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Meta-train ProtoNet, FEAT or MAML on seen classes.

    Test the result with 'refilled fewshot --teacher RUN'. Repeat the command to resume an interrupted run.
    """
    from refilled.fewshot.meta_training import meta_train as train
    from refilled.training.journal import Interrupted

    given = {name: value for name, value in flags.items() if value is not None}
    run = MetaRun(data=data, settings=dict(key_value(text) for text in set_ or ()), **given)
    folder = out or Path("runs") / f"meta-{_few_shot_name(run.data, run.method, run.n_way, run.n_shot, run.seed)}"
    try:
        result = train(run, folder, display=display(quiet or as_json))
    except Interrupted as interruption:
        err.print("interrupted; the state is saved. Repeat the command to resume", markup=False)
        sys.exit(128 + interruption.number)
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    spread = "" if result.interval is None else f" ± {result.interval:.2f}"
    console.print(f"best on validation tasks: {result.val_accuracy:.2f}{spread} %, epoch {result.best_epoch}")
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


def _reached(all_: int, done: int, accuracy: float, interval: float | None) -> str:
    return f"{done}/{all_} tasks  {accuracy:.2f}" + ("" if interval is None else f" ± {interval:.2f}") + " %"


def _few_shot_name(data: str, method: str, n_way: int, n_shot: int, seed: int) -> str:
    parts = [Path(data).name, Path(method).stem, f"{n_way}way{n_shot}shot", f"s{seed}"]
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)
