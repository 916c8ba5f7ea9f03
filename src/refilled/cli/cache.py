"""The commands of ``cache``: the teacher's embeddings on disk."""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from refilled.cli.options import MOST_JOBS, Cpus, Executor, Gpus, Quiet, configure, descriptions, run_flags, up_to
from refilled.cli.show import console, say, silent
from refilled.errors import RunError
from refilled.ranges import MOST
from refilled.recipe import Recipe
from refilled.words import count_of, plural, printable

if TYPE_CHECKING:
    from refilled.training.teacher_cache import TeacherCache


cache = typer.Typer(help="Manage cached embeddings of teachers, for runs with --views.", no_args_is_help=True)
_NOT_CACHED = {f.name for f in fields(Recipe)} - {
    "augmentation",
    "mixup",
    "cutmix",
    "auto_augment",
    "color_jitter",
    "random_erasing",
    "precision",
    "seed",
}  # these do not affect an embedding


@cache.command()
@run_flags("student", "method", "settings", "score", "pretrained", *_NOT_CACHED)
def build(
    task: Annotated[
        str, typer.Argument(help="Task, for example digits:5-9, or a folder of images.", show_default=False)
    ],
    teacher: Annotated[str, typer.Option(help=escape(descriptions()["teacher"]), show_default=False)],
    views: Annotated[
        int, typer.Option(help="Number of augmented views per image.", min=1, callback=up_to(MOST), show_default=False)
    ],
    jobs: Annotated[
        int, typer.Option(help="Number of processes that share the work.", min=1, callback=up_to(MOST_JOBS))
    ] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    quiet: Quiet = False,
    **flags: Any,
) -> None:
    """Embed views of a task's images with a teacher, for all runs with these views.

    Several commands can share the work.
    """
    from refilled.grid.cache_building import build_cache_together
    from refilled.grid.executors import find_executor
    from refilled.runs.teacher_caches import build_cache

    run = configure(None, {"task": task, "teacher": teacher, "views": views, **flags})
    if jobs == 1 and executor == "local":
        _print_cache(build_cache(run, say=silent if quiet else say))
    else:
        _print_cache(build_cache_together(run, jobs, find_executor(executor, cpus, gpus)))


@cache.command()
def info() -> None:
    """List the caches on this machine and their contents."""
    for each in _open_caches():
        _print_cache(each)


@cache.command()
def verify() -> None:
    """Check all caches on this machine, and print damaged and missing files.

    A run or 'cache build' repairs them. Exits with 1 if any file is damaged.
    """
    damaged = 0
    for each in _open_caches():
        problems = each.problems()
        damaged += len(problems)
        for shard, problem in problems.items():
            say(f"{each.path(shard)}: {problem}")
        complete = each.contents.shards - len(problems)
        shards = count_of(each.contents.shards, "shard")
        console.print(f"{each.folder.name}: {complete} of {shards} complete", highlight=False)
    if damaged:
        raise typer.Exit(1)


def _open_caches() -> list["TeacherCache"]:
    from refilled.runs.teacher_caches import list_caches
    from refilled.training.teacher_cache import TeacherCache

    opened = []
    for folder in list_caches():
        try:
            opened.append(TeacherCache.open(folder))
        except RunError as error:  # for example a cache of an earlier version; show the others
            say(str(error))
    return opened


def _print_cache(cache: "TeacherCache") -> None:
    contents, (teacher, task) = cache.contents, cache.of
    shape = " x ".join(
        [
            f"{contents.images:,} {plural(contents.images, 'image')}",
            count_of(contents.views, "view"),
            count_of(contents.embedding_dim, "number"),
        ]
    )
    made = f"{cache.shards_on_disk()} of {count_of(contents.shards, 'shard')}, {cache.size / 2**20:,.1f} MB"
    lines = cache.folder.name, f"  {shape}, {made}", f"  of {teacher}, in {contents.precision}", f"  on {task}"
    console.print("\n".join(map(printable, lines)), markup=False, highlight=False, soft_wrap=True)
