"""The command ``embed``: embeddings of images as a table."""

from pathlib import Path
from typing import Annotated

import typer

from refilled.cli.options import up_to
from refilled.cli.show import console, err, say
from refilled.ranges import PIXELS, SHARE, STD, check
from refilled.words import count_of, printable


def embed(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|TEACHER",
            help="Folder of a run, or a teacher in any form of 'distill --teacher'.",
            show_default=False,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders with images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Table to write: FILE.parquet, FILE.csv or FILE.npz.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="<int>",
            help="Side length in pixels of the images. Default: the model's.",
            min=1,
            callback=up_to(PIXELS.most),
        ),
    ] = None,
    teacher_mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="R G B", help="Channel means of the teacher's input, from 0 to 1."),
    ] = None,
    teacher_std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="R G B", help="Channel standard deviations, on the same scale."),
    ] = None,
    teacher_size: Annotated[
        int | None,
        typer.Option(
            metavar="<int>", help="Side length in pixels of the teacher's input.", min=1, callback=up_to(PIXELS.most)
        ),
    ] = None,
    teacher_embedding: Annotated[
        str | None, typer.Option(help="Output of the teacher that is its embedding: pooled, token, mean or both.")
    ] = None,
) -> None:
    """Write the embeddings of images to a table; for a student, also classes and probabilities."""
    from typing import cast, get_args

    from refilled.errors import RunError, unknown
    from refilled.models.backbone import Pooling
    from refilled.runs.embedding import check_table, open_network, write_embeddings

    check_table(out, overwrite)
    check(teacher_mean=(teacher_mean, SHARE), teacher_std=(teacher_std, STD))
    if teacher_embedding is not None and teacher_embedding not in get_args(Pooling):
        raise RunError(unknown("embedding", teacher_embedding, get_args(Pooling)))
    network = open_network(
        model,
        mean=teacher_mean,
        std=teacher_std,
        input_size=teacher_size,
        image_size=image_size,
        pooling=cast(Pooling | None, teacher_embedding),
    )
    for note in network.notes:
        say(f"note: {printable(note)}")
    written = write_embeddings(network, images, out, overwrite)
    for image, reason in written.unreadable:
        line = f"left out {printable(str(image))}: {printable(reason)}"
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    summary = f"{count_of(written.images, 'embedding')} of {count_of(written.embedding_dim, 'number')}"
    console.print(f"{summary}: {printable(str(out))}", markup=False, highlight=False, soft_wrap=True)
    if written.unreadable:
        say(f"{count_of(len(written.unreadable), 'image')} could not be read")
        raise typer.Exit(1)
