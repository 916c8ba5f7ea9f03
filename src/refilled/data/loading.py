"""Load a task from its text: open the source, choose classes, divide, decode."""

from pathlib import Path

from refilled.data.decoded import (
    copies_notes,
    decode_division,
    grey_notes,
    labelled_split,
    refuse_bad,
    refuse_too_few,
)
from refilled.data.division import open_and_divide
from refilled.data.grey import GreyRange
from refilled.data.opening import data_folder, open_source
from refilled.data.several import Several
from refilled.data.source import stamp_of
from refilled.data.task import Task, fingerprint
from refilled.data.task_size import settle_image_size
from refilled.data.task_text import TaskOptions, parse_task_text
from refilled.data.unlabelled import decode_unlabelled, find_unlabelled, unlabelled_notes, unlabelled_split


def load_task(
    text: str,
    *,
    data_root: Path | None = None,
    shots: int | None = None,
    shots_seed: int = 0,
    val: float = 0.1,
    image_size: int | None = None,
    allow_bad: bool = False,
    memory_limit: int | None = None,
    unlabelled: str | None = None,
    grey_range: GreyRange | None = None,
) -> Task:
    """Load a task from its text form, ``SOURCE[:SELECTION][@key=value,...]``.

    The same text and arguments give the same task in any process, whatever the order in which a folder is listed.

    * A source without a test part: a fifth of each class is cut off as the test part. A source without a val part:
      ``val`` of each class is cut off the training part. At least one image per class stays. If a class has two or
      more images, at least one is held out. Copies of a picture stay on one side of a cut.
    * ``shots`` are drawn last, from the remaining training images.
    * Images are square: the short side is scaled to ``image_size`` and the centre square is kept. The automatic size is
      the median short side of up to 256 training images, at most 224. Some sources set their own size (digits: 16).
    * Pictures with more than 8 bits per channel are scaled to 8, all with the same range of levels, that of the
      training images: 8, 10, 12, 14 or 16 bits; for fractions and negative levels, their extremes.
    * Class ids count from 0 in the order of the source's classes.
    * The selections ``seen``, ``val`` and ``unseen`` take one side of a class split; see
      :func:`~refilled.data.class_split.split_classes`.

    Args:
        text: The task. Its options ``shots``, ``shots_seed``, ``val`` and ``size`` take precedence over the arguments
            below. Further options: ``seed`` (of halves, cuts and shots), ``test`` (fraction of each class to test on,
            cut from all images instead of the source's own parts), ``augment``, ``image`` and ``label`` (columns of a
            table or list), ``split`` (which classes are seen and unseen), and ``bits`` (bits per channel in use, 8 to
            16).
        data_root: Folder of the data sets. None: ``REFILLED_DATA`` or ``~/.cache/refilled/data``.
        shots: Training images per class. None: all.
        shots_seed: Seed of the choice of shots.
        val: Fraction of the training part to validate on; 0: no validation part.
        image_size: Side length S in pixels. None: found from the images.
        allow_bad: Leave out unreadable images even if they are more than 1 %.
        memory_limit: Bytes above which a part's images lie on disk. None: a quarter of the free memory.
        unlabelled: Images to learn from without their labels: ``"rest"`` for the training images that the shots left
            out, a folder with images at any depth, or the text of a task, of which the training images are used. A
            table or shards need no labels. Images that equal one of ``val`` or ``test`` are left out.
        grey_range: Black and white of pictures with more than 8 bits per channel, as a student was trained with. None:
            that of the training images.

    Raises:
        TaskError: The text is invalid, the data are missing or damaged, a class has too few images or none to
            train on, or more than 1 % of the images are unreadable.
    """
    root = data_folder(data_root)
    parsed = parse_task_text(
        text, root, TaskOptions(shots=shots, shots_seed=shots_seed, val=float(val), size=image_size)
    )
    source, division = open_and_divide(parsed, root)
    size = settle_image_size(parsed, source)
    decoded, grey = decode_division(division, parsed.options, size, memory_limit, grey_range)
    skipped = tuple(bad for part in decoded.values() for bad in part.skipped)
    if not allow_bad:
        refuse_bad(skipped, sum(len(part.rows) for part in decoded.values()))
    refuse_too_few(decoded["train"], division, source, parsed.options.shots)
    splits = {name: labelled_split(part, division.classes) for name, part in decoded.items()}
    extra = None
    if unlabelled is not None:
        part, rows = find_unlabelled(unlabelled, division, decoded["train"], root)
        extra = decode_unlabelled(part, rows, decoded, size, memory_limit, grey)
        if not allow_bad:
            refuse_bad(extra.skipped, len(extra.rows))
    without_labels = None if extra is None else unlabelled_split(extra)
    names = tuple(source.classes[position] for position in division.classes)
    return Task(
        name=parsed.resolved(root),
        classes=names,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        image_size=size,
        augmentation=parsed.options.augment or source.augmentation,
        fingerprint=fingerprint(names, (splits["train"], splits["val"], splits["test"])),
        skipped=skipped + (() if extra is None else extra.skipped),
        notes=(
            *source.notes,
            *division.notes,
            *grey_notes(grey, grey_range),
            *copies_notes(decoded),
            *([] if extra is None else unlabelled_notes(extra)),
        ),
        ignored=source.ignored,
        copies=division.copies,
        left_out=sum((part.copies for part in [*decoded.values(), *([] if extra is None else [extra])]), Several()),
        grey_range=grey,
        licence=source.licence,
        citation=source.citation,
        unlabelled=without_labels,
        unlabelled_fingerprint=None if without_labels is None else fingerprint((), (without_labels,)),
    )


def task_stamp(text: str, data_root: Path | None = None) -> str:
    """Return a digest of the state of a task's files, without reading the images.

    Equal stamps mean equal images. Different stamps mean that files were written, added, removed or copied; their
    content may still be the same, which :attr:`Task.fingerprint` shows.

    Raises:
        TaskError: The text is invalid, or the data are missing or damaged.
    """
    root = data_folder(data_root)
    source = open_source(parse_task_text(text, root, TaskOptions()), root)
    return stamp_of((), *(part.stamp() for part in (source.train, source.val, source.test) if part is not None))
