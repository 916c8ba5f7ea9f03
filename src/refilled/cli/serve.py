"""The command ``serve``: a page and an API for a run's student."""

from typing import Annotated

import typer

from refilled.cli.options import Folder, up_to
from refilled.cli.show import say
from refilled.words import printable


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is local.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 selects a free one.", min=0, max=65535)] = 8000,
    no_nearest: Annotated[bool, typer.Option("--no-nearest", help="Do not show the nearest training images.")] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also show the nearest class means of the run's teacher.")
    ] = False,
    max_bytes: Annotated[
        int, typer.Option(help="Maximum size of a request in bytes.", min=1, callback=up_to(2**40))
    ] = 32 * 2**20,
    max_pixels: Annotated[
        int, typer.Option(help="Maximum number of pixels per picture.", min=1, callback=up_to(2**40))
    ] = 50_000_000,
) -> None:
    """Serve a student over HTTP: a web page, and predictions as JSON."""
    from refilled.serve.server import serve as run

    run(
        folder,
        host,
        port,
        nearest=not no_nearest,
        teacher=teacher,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        say=lambda text: say(printable(text)),
    )
