"""Load unlabelled images for training, and leave out those that equal images of val or test."""

from pathlib import Path

import numpy as np
import torch

from refilled.data.decoded import Decoded, all_rows, decode_part
from refilled.data.division import Division, choose_classes, rows_of_classes
from refilled.data.grey import GreyRange
from refilled.data.opening import open_source
from refilled.data.source import Names, Part, Rows
from refilled.data.sources.csv_folder import is_csv_folder
from refilled.data.sources.image_folder import open_loose_images
from refilled.data.sources.parquet import is_parquet
from refilled.data.task import Split
from refilled.data.task_text import TaskOptions, parse_task_text
from refilled.errors import TaskError
from refilled.words import count_of, plural

REST = "rest"
"""The text for the training images that the shots left out."""


def find_unlabelled(text: str, division: Division, train: Decoded, data_root: Path) -> tuple[Part, Rows]:
    """Return the part of the unlabelled images, and their rows.

    Args:
        text: ``"rest"``, a folder, or the text of a task.
        division: The division of the labelled task.
        train: The training images of the labelled task.
        data_root: Folder of the data sets.

    Raises:
        TaskError: The text is invalid, or there are no such images.
    """
    if text != REST:
        return open_unlabelled(text, data_root)
    unreadable = {name for name, _ in train.skipped}
    rows = np.setdiff1d(division.rows["train"], train.rows)
    if unreadable:
        rows = rows[[train.part.name(row) not in unreadable for row in rows.tolist()]]
    if not len(rows):
        raise TaskError(
            "--unlabelled rest uses the training images that --shots leaves out, but none are left out; give --shots, "
            "or name a folder or a task of other images"
        )
    return train.part, rows


def open_unlabelled(text: str, data_root: Path) -> tuple[Part, Rows]:
    """Return the images of a folder at any depth, or the training images of a task, as a part and its rows.

    Raises:
        TaskError: The text is invalid, or there are no images.
    """
    parsed = parse_task_text(text, data_root, TaskOptions())
    folder = Path(parsed.source)
    loose = parsed.kind == "path" and folder.is_dir() and parsed.selection is None
    if loose and not is_parquet(folder) and not is_csv_folder(folder):
        part: Part = open_loose_images(folder)
        rows = np.arange(len(part.labels))
    else:
        source, chosen = choose_classes(open_source(parsed, data_root, labelled=parsed.selection is not None), parsed)
        part, rows = source.train, rows_of_classes(source.train, chosen)
    if not len(rows):
        raise TaskError(f"--unlabelled: there are no images in '{text}'")
    return part, rows


def decode_unlabelled(
    part: Part, rows: Rows, others: dict[str, Decoded], size: int, memory_limit: int | None, grey: GreyRange | None
) -> Decoded:
    """Decode unlabelled images, without those that equal an image of val or test.

    Args:
        part: The part of the unlabelled images.
        rows: Their rows ``(M,)``, ascending.
        others: The decoded parts of the labelled task.
        size: Side length S of the images.
        memory_limit: Bytes above which the images lie on disk. None: a quarter of the free memory.
        grey: Black and white of pictures with more than 8 bits per channel.

    Raises:
        TaskError: No image is left.
    """
    held_out = np.concatenate([others["val"].digests, others["test"].digests])
    decoded = decode_part(part, rows, all_rows, held_out, size, memory_limit, grey)
    if not len(decoded.rows):
        raise TaskError("no unlabelled image is left: all are unreadable or equal an image of val or test")
    return decoded


def unlabelled_split(decoded: Decoded) -> Split:
    """Return decoded images with label -1."""
    labels = torch.full((len(decoded.rows),), -1)
    return Split(decoded.pixels, labels, Names(decoded.part, decoded.rows), decoded.digests)


def unlabelled_notes(decoded: Decoded) -> list[str]:
    """Return a note on unlabelled images that were left out as copies."""
    count = decoded.copies.count
    if not count:
        return []
    equal = plural(count, "it equals an image", "they equal images")
    return [f"{count_of(count, 'unlabelled image')} left out: {equal} of val or test"]
