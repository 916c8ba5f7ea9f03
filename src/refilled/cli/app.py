"""The application of the command line: its commands and the handling of errors.

Each command makes one library call. Heavy imports are inside the commands, so that help and errors appear at once.
"""

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from refilled.cli.cache import cache
from refilled.cli.compare import compare, demo
from refilled.cli.doctor import doctor
from refilled.cli.embed import embed
from refilled.cli.ending import Terminated, ending_by_signal, explain, what_was_left
from refilled.cli.export import export
from refilled.cli.fewshot import fewshot, meta_train
from refilled.cli.labels import labels
from refilled.cli.report import push, report
from refilled.cli.reproduce import reproduce
from refilled.cli.serve import serve
from refilled.cli.show import console, err, processes, rank
from refilled.cli.teachers import teachers
from refilled.cli.train import distill, train
from refilled.cli.tune import tune
from refilled.cli.use import evaluate, list_, predict
from refilled.errors import RunError
from refilled.network import forbidden, go_offline
from refilled.words import printable

app = typer.Typer(
    help="Distil a strong vision model trained on other classes into a small model for your own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"refilled {version('refilled')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Do not use the network. Same as REFILLED_OFFLINE=1."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Handle the options before the command; :func:`main` handles ``--debug``."""
    if offline:
        go_offline()


for _command in (
    train,
    distill,
    evaluate,
    predict,
    export,
    embed,
    serve,
    compare,
    fewshot,
    meta_train,
    tune,
    teachers,
    labels,
    demo,
    reproduce,
    report,
    push,
    doctor,
):
    app.command()(_command)
app.command(name="list")(list_)
app.add_typer(cache, name="cache")


def main() -> None:
    """Run the command line. A known error is printed as one line; ``--debug`` shows its traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--debug", "--offline")]
    if "--offline" in sys.argv or forbidden():
        go_offline()
    if rank() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # rank 0 alone prints results
    try:
        with ending_by_signal():
            _refuse_torchrun(arguments)
            app(arguments, prog_name="refilled", standalone_mode=True)
    except BrokenPipeError:
        # The reader has closed the pipe: no second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Terminated:
        if rank() == 0:
            err.print(f"ended by SIGTERM; {printable(what_was_left(arguments))}", markup=False, soft_wrap=True)
        sys.exit(143)
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        if _first_to_tell(message):
            err.print(f"[red]error:[/red] {escape(printable(message))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _refuse_torchrun(arguments: list[str]) -> None:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if processes() > 1 and command not in (None, "train", "distill"):
        raise RunError(
            f"torchrun works with 'refilled train' and 'refilled distill' only; start 'refilled {command}' without "
            "torchrun. Commands that execute many runs divide them among processes with --jobs"
        )


def _first_to_tell(message: str) -> bool:
    if processes() == 1:
        return True
    from refilled.training.distributed import first_to_tell

    return first_to_tell(message)
