"""The command ``serve``: a page and an API for a run's student."""

from typing import Annotated

import typer

from refilled.cli.options import Folder
from refilled.cli.show import printable, say


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address; 127.0.0.1 is reached by this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    nearest: Annotated[bool, typer.Option("--nearest/--no-nearest", help="Show the nearest training images.")] = True,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Show the nearest class means of the run's teacher.")
    ] = False,
    max_bytes: Annotated[int, typer.Option(help="The most bytes of a request.", min=1, max=2**40)] = 32 * 2**20,
    max_pixels: Annotated[int, typer.Option(help="The most pixels of a picture.", min=1, max=2**40)] = 50_000_000,
) -> None:
    """Serve a student: a page to drop pictures on, and predictions as JSON."""
    from refilled.serve.server import serve as run

    run(
        folder,
        host,
        port,
        nearest=nearest,
        teacher=teacher,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        say=lambda text: say(printable(text)),
    )
