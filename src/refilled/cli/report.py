"""Commands about a finished run: ``report`` and ``push``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refilled.cli.options import Folder
from refilled.cli.show import console, say

if TYPE_CHECKING:
    from refilled.runs.prepared import Prepared


def report(
    folder: Folder,
    against: Annotated[
        Path | None,
        typer.Option(help="Run without the teacher on the same images, for comparison.", show_default=False),
    ] = None,
) -> None:
    """Write report.html and the model card README.md of a finished run."""
    from refilled.report.page import report_on

    page = report_on(folder, against)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def push(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: USER/NAME.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a student and its model card to the Hugging Face hub."""
    from refilled.report.push import push as upload

    console.print(f"uploaded: {upload(folder, name, private)}", markup=False, highlight=False, soft_wrap=True)


def report_after(prepared: "Prepared", folder: Path) -> None:
    """Write the report of a run that has just finished. An error is only a warning, because the run is complete."""
    try:
        from refilled.report.page import report_on_prepared

        report_on_prepared(prepared, folder)
    except Exception as error:
        from refilled.report.many import no_report

        say(no_report(folder, f"{type(error).__name__}: {error}"))
