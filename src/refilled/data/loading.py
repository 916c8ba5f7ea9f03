"""From a task's text to the task: open the source, choose classes, divide, decode."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from refilled.data.class_split import SIDES, ClassSplit, parts_share_no_class, split_classes
from refilled.data.decode import find_grey_range, has_deep, keep, read_pixels, short_side
from refilled.data.grey import NO_RANGE, GreyRange
from refilled.data.partition import (
    DIGEST,
    Digests,
    content_keys,
    count_copies,
    draw_shots,
    first_rows,
    hold_out,
    hold_out_by_content,
    pixel_digests,
)
from refilled.data.selection import select_classes
from refilled.data.source import Names, Part, Rows, Source, pool, stamp_of
from refilled.data.sources import cifar100, cub, digits, letters
from refilled.data.sources.cifar100 import open_cifar100
from refilled.data.sources.csv_folder import is_csv_folder, is_list, open_csv_folder
from refilled.data.sources.cub import open_cub
from refilled.data.sources.digits import open_digits
from refilled.data.sources.hub import open_hub
from refilled.data.sources.image_folder import open_image_folder, open_loose_images
from refilled.data.sources.letters import open_letters
from refilled.data.sources.parquet import is_parquet, open_parquet
from refilled.data.sources.webdataset import open_webdataset
from refilled.data.store import Pixels, StoredImages, free_memory, stored_images
from refilled.data.task import Split, Task, fingerprint
from refilled.data.task_text import TaskOptions, TaskText, expand_home, parse_task_text
from refilled.data.transforms import Augmentation
from refilled.errors import TaskError

TEST_FRACTION = 0.2  # cut from a source that has no test part
MAX_BAD_FRACTION = 0.01
LARGEST_AUTOMATIC_SIZE = 224
REST = "rest"
"""Stands for the training images that the shots left out."""
NO_DIGESTS: Digests = np.empty(0, dtype=DIGEST)
_LOOKED_AT = 256  # images whose size is looked at to find the automatic size
_OPENED = 32  # of the first images, which a table gives quickly, to see whether they have more than 8 bits a channel


def list_datasets() -> list[tuple[str, str]]:
    """Return what a task's text can begin with, and a line on each."""
    return [
        ("digits", digits.SUMMARY),
        ("letters", letters.SUMMARY),
        ("cifar100", cifar100.SUMMARY),
        ("cub", cub.SUMMARY),
        ("cifar_fs, fc100", "CIFAR-100 with its classes split for few-shot learning, as in cifar_fs:seen"),
        ("folder:PATH", "class folders of images, with or without train, val and test above them; PATH alone will do"),
        ("NAME", "a folder of this name below the data root: class folders, or train.parquet and test.parquet"),
        ("FILE.parquet", "a table with a column of encoded images and one of labels"),
        ("FILE.csv", "a list of images and labels; a folder with labels.csv, or with train.csv and test.csv, will do"),
        ("wds:PATH", "WebDataset shards: a tar file, or a folder of them, with a .cls member beside each image"),
        ("hub:NAME", "a data set of the Hugging Face hub"),
    ]


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

    The same text and arguments give the same task, in any process and whatever order a folder is listed in.

    * A source without a test part has a fifth of each class cut off for it; then ``val`` of each class is cut off the
      training part, unless the source has a val part. At least one image of a class stays and, where a class has two
      or more, at least one is held out; a class's only image trains. Copies of a picture stay on one side of a cut.
    * ``shots`` are drawn last, from what is left to train on.
    * Images are square: the short side is scaled to ``image_size`` and the middle kept. The automatic size is the
      median short side of up to 256 training images, at most 224; a source may know better (digits: 16).
    * Pictures with more than 8 bits a channel are scaled to 8, all by one range of levels, which is that of the
      training images: 8, 10, 12, 14 or 16 bits, or for fractions and negative levels their extremes.
    * Class ids count from 0 in the order of the source's classes.
    * The selections ``seen``, ``val`` and ``unseen`` take one side of a class split; see
      :func:`~refilled.data.class_split.split_classes`.

    Args:
        text: The task. Its options ``shots``, ``shots_seed``, ``val`` and ``size`` go before the arguments below;
            besides there are ``seed`` (of halves, cuts and shots), ``test`` (the fraction of each class to test on, cut
            from all images in place of the source's own parts), ``augment``, ``image`` and ``label``, the columns of
            a table or list, ``split``, which classes are seen and unseen, and ``bits``, how many bits of a channel
            are used (8 to 16).
        data_root: Where data sets lie; ``REFILLED_DATA`` or ``~/.cache/refilled/data`` if None.
        shots: Training images of each class; all if None.
        shots_seed: Which ones.
        val: Fraction of the training part to validate on; 0 for none at all.
        image_size: Side length S; found from the images if None.
        allow_bad: Leave out images that cannot be read even if they are more than 1 %.
        memory_limit: Bytes above which a part's images lie on disk; a quarter of the memory that is free if None.
        unlabelled: Images to learn from without their labels: ``"rest"`` for the training images that the shots left
            out, a folder with images at any depth, or the text of a task, whose training images are taken; a table or
            shards need no labels. Images that equal one of ``val`` or ``test`` are left out.
        grey_range: Black and white of pictures with more than 8 bits a channel, as a student was trained with; that of
            the training images if None.

    Raises:
        TaskError: The text is not understood, the data are missing or damaged, a class has too few images or none to
            train on, or more than 1 % of the images cannot be read.
    """
    root = data_folder(data_root)
    wanted = parse_task_text(
        text, root, TaskOptions(shots=shots, shots_seed=shots_seed, val=float(val), size=image_size)
    )
    source, plan = _plan(wanted, root)
    size = _size(wanted, source)
    decoded, grey = _decode(plan, wanted.options, size, memory_limit, grey_range)
    skipped = tuple(bad for part in decoded.values() for bad in part.skipped)
    if not allow_bad:
        refuse_bad(skipped, sum(len(part.rows) for part in decoded.values()))
    _check_train(decoded["train"], plan, source, wanted.options.shots)
    splits = {name: _split(part, plan) for name, part in decoded.items()}
    extra = None
    if unlabelled is not None:
        where = _find_unlabelled(unlabelled, plan, decoded["train"], root)
        extra = _decode_unlabelled(*where, decoded, size, memory_limit, grey)
        if not allow_bad:
            refuse_bad(extra.skipped, len(extra.rows))
    without_labels = None if extra is None else _without_labels(extra)
    names = tuple(source.classes[position] for position in plan.classes)
    return Task(
        name=wanted.resolved(root),
        classes=names,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        image_size=size,
        augmentation=wanted.options.augment or source.augmentation,
        fingerprint=fingerprint(names, (splits["train"], splits["val"], splits["test"])),
        skipped=skipped + (() if extra is None else extra.skipped),
        notes=(
            *source.notes,
            *plan.notes,
            *grey_notes(grey, grey_range),
            *_copies_notes(decoded),
            *([] if extra is None else _unlabelled_notes(extra)),
        ),
        grey_range=grey,
        licence=source.licence,
        citation=source.citation,
        unlabelled=without_labels,
        unlabelled_fingerprint=None if without_labels is None else fingerprint((), (without_labels,)),
    )


def task_stamp(text: str, data_root: Path | None = None) -> str:
    """Return a digest of the state of a task's files, without reading the images.

    Equal stamps mean equal images. Different stamps mean that files were written, added, removed or copied since; what
    is in them may still be the same, as :attr:`Task.fingerprint` tells.

    Raises:
        TaskError: The text is not understood, or the data are missing or damaged.
    """
    root = data_folder(data_root)
    source = open_source(parse_task_text(text, root, TaskOptions()), root)
    return stamp_of((), *(part.stamp() for part in (source.train, source.val, source.test) if part is not None))


@dataclass(frozen=True)
class TaskSize:
    """How large a task is; the numbers of images include those that may turn out unreadable or copies."""

    class_names: tuple[str, ...]
    train: int
    val: int
    test: int
    image_size: int
    """Side length S in pixels."""
    augmentation: Augmentation
    """What suits the source."""
    images_per_second: float
    """How fast they are decoded here, found from a few of them."""
    unlabelled: int = 0


def task_size(
    text: str,
    *,
    data_root: Path | None = None,
    shots: int | None = None,
    val: float = 0.1,
    image_size: int | None = None,
    unlabelled: str | None = None,
) -> TaskSize:
    """Find out how large a task is from a few of its images; the arguments are those of :func:`load_task`.

    Raises:
        TaskError: As :func:`load_task`, but for what only the pixels tell.
    """
    root = data_folder(data_root)
    wanted = parse_task_text(text, root, TaskOptions(shots=shots, val=float(val), size=image_size))
    source, plan = _plan(wanted, root)
    counts = np.bincount(plan.parts["train"].labels[plan.rows["train"]])
    if wanted.options.shots is not None:
        counts = counts.clip(max=wanted.options.shots)
    size = _size(wanted, source)
    extra = 0
    if unlabelled == REST:
        extra = len(plan.rows["train"]) - int(counts.sum())
    elif unlabelled is not None:
        extra = len(_open_unlabelled(unlabelled, root)[1])
    return TaskSize(
        class_names=tuple(source.classes[position] for position in plan.classes),
        train=int(counts.sum()),
        val=len(plan.rows["val"]),
        test=len(plan.rows["test"]),
        image_size=size,
        augmentation=wanted.options.augment or source.augmentation,
        images_per_second=_decoding_rate(plan.parts["train"], plan.rows["train"], size),
        unlabelled=extra,
    )


@dataclass(frozen=True)
class _Plan:
    """Which rows of which part of the source make up train, val and test."""

    classes: tuple[int, ...]  # positions in the source's classes
    parts: dict[str, Part]
    rows: dict[str, Rows]
    cut: frozenset[str]  # names of those that were cut off the training part here
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """The images of one part that could be read and kept."""

    part: Part
    rows: Rows
    pixels: Pixels
    digests: Digests  # of the pixels
    skipped: tuple[tuple[str, str], ...]
    copies: int  # left out since they equal an image that was held out


def data_folder(data_root: Path | None) -> Path:
    """Where data sets lie: as given, else ``REFILLED_DATA``, else ``~/.cache/refilled/data``."""
    return expand_home(data_root or Path(os.environ.get("REFILLED_DATA") or "~/.cache/refilled/data"))


def _plan(wanted: TaskText, root: Path) -> tuple[Source, _Plan]:
    source = open_source(wanted, root)
    if wanted.options.test is not None:
        source = pool(source)
    source, classes = _select(source, wanted)
    return source, _divide(source, classes, wanted.options)


def _select(source: Source, wanted: TaskText) -> tuple[Source, Sequence[int]]:
    """Choose the classes; on one side of a class split, the parts of the source may not be what is trained on."""
    if wanted.selection not in SIDES or wanted.selection in source.classes:
        return source, select_classes(wanted.selection, source.classes, seed=wanted.options.seed)
    split = split_of(source, wanted)
    if parts_share_no_class(source):
        source = pool(source)
    source = replace(
        source,
        image_size=split.image_size or source.image_size,
        augmentation=split.augmentation or source.augmentation,
    )
    return source, getattr(split, wanted.selection)


def split_of(source: Source, wanted: TaskText) -> ClassSplit:
    """Find the class split that goes with a task's text; see :func:`split_classes`."""
    path = Path(wanted.source)
    beside = None if wanted.kind not in ("path", "wds") else path if path.is_dir() else path.parent
    return split_classes(source, path.name, beside, wanted.options.split)


def _size(wanted: TaskText, source: Source) -> int:
    return wanted.options.size or source.image_size or automatic_size(source.train)


def open_source(wanted: TaskText, data_root: Path, *, labelled: bool = True) -> Source:
    """Open the source that a task's text names.

    Args:
        wanted: The task's text.
        data_root: Where data sets lie.
        labelled: Whether labels are needed; without them, every image of a table or of shards is of one class.

    Raises:
        TaskError: It is missing, damaged, or has no columns where some were named.
    """
    columns = (wanted.options.image, wanted.options.label)
    if wanted.kind in ("cifar100", "cifar_fs", "fc100"):
        return open_cifar100(data_root, *columns)
    if wanted.kind == "hub":
        return open_hub(wanted.source, *columns)
    if wanted.kind == "wds":
        return open_webdataset(Path(wanted.source), *columns, labelled=labelled)
    if wanted.kind == "path" and is_parquet(Path(wanted.source)):
        return open_parquet(Path(wanted.source), *columns, labelled=labelled)
    if wanted.kind == "path" and (is_list(Path(wanted.source)) or is_csv_folder(Path(wanted.source))):
        return open_csv_folder(Path(wanted.source), *columns)
    if any(columns):
        raise TaskError(f"'{wanted.source}' is no table and has no columns; leave out @image= and @label=")
    if wanted.kind == "digits":
        return open_digits()
    if wanted.kind == "letters":
        return open_letters()
    if wanted.kind == "cub":
        return open_cub(data_root)
    if not Path(wanted.source).is_dir():
        raise TaskError(
            f"{wanted.source} is neither a folder, nor a .parquet file, nor a .csv list of images and labels"
        )
    return open_image_folder(Path(wanted.source))


def _divide(source: Source, chosen: Sequence[int], options: TaskOptions) -> _Plan:
    """Choose the rows of every part, and cut the parts that the source does not have."""
    given = {
        "train": source.train,
        "val": _with_any(source.val, chosen) if options.val else None,
        "test": _with_any(source.test, chosen),
    }
    parts = {name: part or source.train for name, part in given.items()}
    rows = {name: _rows_of(part, chosen) for name, part in given.items()}
    wanted = {"test": options.test or TEST_FRACTION, "val": options.val}
    cut = {name: fraction for name, fraction in wanted.items() if given[name] is None and fraction}
    cut_rows, notes = _cut(source, rows["train"], cut, options.seed)
    rows.update(cut_rows)
    present = {name: set(np.unique(parts[name].labels[rows[name]]).tolist()) for name in parts}
    for position in sorted((present["val"] | present["test"]) - present["train"]):
        raise TaskError(
            f"class '{source.classes[position]}' has images in val or test but none to train on; add some, or choose "
            "the other classes"
        )
    classes = tuple(position for position in chosen if position in present["train"])
    if len(classes) < 2:
        raise TaskError(f"a task needs at least two classes with images to train on, but there are {len(classes)}")
    notes += _absence_note("no images, left out", source, set(chosen) - present["train"])
    if not len(rows["test"]):
        raise TaskError(
            "there are no images to test on: every class has a single picture, which trains. Add images, or a test part"
        )
    for name in ("val", "test"):
        if len(rows[name]):
            notes += _absence_note(f"no {name} images", source, set(classes) - present[name])
    return _Plan(classes, parts, rows, frozenset(cut), tuple(notes))


def _cut(source: Source, rows: Rows, fractions: dict[str, float], seed: int) -> tuple[dict[str, Rows], list[str]]:
    """Cut held-out parts off the training part; returns the rows of every part, and notes."""
    cut = {"train": rows}
    notes: list[str] = []
    if not fractions:
        return cut, notes
    part = source.train
    keys = np.zeros(len(part.labels), dtype=np.uint64)
    keys[rows] = content_keys(part.pictures(rows))
    copies = count_copies(keys[rows])
    if copies:
        notes.append(f"{copies} images are copies of others; copies are kept on one side of every cut")
    for name, fraction in fractions.items():
        here = cut["train"]
        labels, known_by = part.labels[here], keys[here]
        if source.fixed:
            firsts = first_rows(here, known_by)
            cut["train"], cut[name] = hold_out(here, labels, firsts, fraction, seed=seed, purpose=name)
        else:
            cut["train"], cut[name] = hold_out_by_content(here, labels, known_by, fraction, seed=seed, purpose=name)
    if "test" in fractions:
        share = f"{fractions['test']:.0%}"
        about = "" if source.fixed else "about "
        notes.append(f"no test part: {about}{share} of the images of each class were cut off for it, seed {seed}")
    return cut, notes


def _with_any(part: Part | None, chosen: Sequence[int]) -> Part | None:
    """Return the part if it holds an image of the chosen classes; one that holds none is no part."""
    return part if len(_rows_of(part, chosen)) else None


def _rows_of(part: Part | None, chosen: Sequence[int]) -> Rows:
    if part is None:
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.isin(part.labels, chosen))


def _absence_note(what: str, source: Source, absent: set[int]) -> list[str]:
    if not absent:
        return []
    names = [source.classes[position] for position in sorted(absent)]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what}: {', '.join(names[:5])}{more}"]


def automatic_size(part: Part) -> int:
    """Return the median short side of images spread evenly over a part, at most 224."""
    rows = np.unique(np.linspace(0, len(part.labels) - 1, _LOOKED_AT).astype(np.int64))
    sides = [side for side in map(short_side, part.pictures(rows)) if side is not None]
    return min(LARGEST_AUTOMATIC_SIZE, int(np.median(sides))) if sides else LARGEST_AUTOMATIC_SIZE


def _decoding_rate(part: Part, rows: Rows, size: int) -> float:
    """Time how many images a second are decoded, on the first of the rows: a table is read in pieces of many rows."""
    some = rows[:_LOOKED_AT]
    grey = find_grey_range(part.pictures(some))
    start = perf_counter()
    read_pixels(part.pictures(some), len(some), size, grey)
    return len(some) / (perf_counter() - start)


def choose_grey_range(part: Part, rows: Rows, options: TaskOptions) -> GreyRange | None:
    """Decide what is black and white in pictures with more than 8 bits a channel, if the first few are such pictures.

    Args:
        part: Where the training images are from.
        rows: Which ones they are ``(N,)``.
        options: May say how many bits there are.
    """
    if options.bits is not None:
        return GreyRange.of_bits(options.bits)
    return find_grey_range(part.pictures(rows)) if has_deep(part.pictures(rows[:_OPENED])) else None


def lacks_grey_range(decoded: Iterable["Decoded"]) -> bool:
    """Whether pictures were left out since their range of levels was not known."""
    return any(reason == NO_RANGE for part in decoded for _, reason in part.skipped)


def grey_notes(found: GreyRange | None, given: GreyRange | None = None) -> list[str]:
    """Say what became black and white, unless whoever asked for the images said so."""
    if found is None or given is not None:
        return []
    return [
        f"in images with more than 8 bits a channel, levels {found} became 0 to 255, in all parts alike; @bits=NUMBER "
        "in the task changes that"
    ]


def _decode(
    plan: _Plan, options: TaskOptions, size: int, memory_limit: int | None, known: GreyRange | None
) -> tuple[dict[str, Decoded], GreyRange | None]:
    """Decode every part by one range of levels, which comes back too; None where no picture needed one."""
    part, rows = plan.parts["train"], plan.rows["train"]
    grey = known or choose_grey_range(part, rows, options)
    decoded = _decode_parts(plan, options, size, memory_limit, grey)
    if grey is None and lacks_grey_range(decoded.values()):  # not the first pictures, but others have more than 8 bits
        grey = find_grey_range(part.pictures(rows))
        if grey is not None:
            decoded = _decode_parts(plan, options, size, memory_limit, grey)
    return decoded, grey


def _decode_parts(
    plan: _Plan, options: TaskOptions, size: int, memory_limit: int | None, grey: GreyRange | None
) -> dict[str, Decoded]:
    """Decode every part.

    A cut keeps copies of a file together. Pictures that are stored differently and turn out to be equal only when
    decoded leave the part that was cut later, so that the test images never depend on what is trained on.
    """

    def draw(pool: Rows) -> Rows:
        if options.shots is None:
            return pool
        labels = plan.parts["train"].labels[pool]
        return draw_shots(pool, labels, options.shots, seed=options.seed, shots_seed=options.shots_seed)

    decoded: dict[str, Decoded] = {}
    held_out = NO_DIGESTS
    for name in ("test", "val", "train"):
        avoid = held_out if name in plan.cut or name == "train" else NO_DIGESTS
        choose = draw if name == "train" else lambda pool: pool
        decoded[name] = decode_part(plan.parts[name], plan.rows[name], choose, avoid, size, memory_limit, grey)
        if name in plan.cut:
            held_out = np.concatenate([held_out, decoded[name].digests])
    return decoded


def _find_unlabelled(text: str, plan: _Plan, train: Decoded, root: Path) -> tuple[Part, Rows]:
    """Return the part that holds the unlabelled images, and their rows."""
    if text != REST:
        return _open_unlabelled(text, root)
    taken = {name for name, _ in train.skipped}
    rows = np.setdiff1d(plan.rows["train"], train.rows)
    rows = rows[[train.part.name(row) not in taken for row in rows.tolist()]] if taken else rows
    if not len(rows):
        raise TaskError(
            "--unlabelled rest takes the training images that --shots leaves out, but none are left out; give --shots, "
            "or name a folder or a task of other images"
        )
    return train.part, rows


def _open_unlabelled(text: str, root: Path) -> tuple[Part, Rows]:
    """Find the images of a folder at any depth, or the training images of a task."""
    wanted = parse_task_text(text, root, TaskOptions())
    folder = Path(wanted.source)
    loose = wanted.kind == "path" and folder.is_dir() and wanted.selection is None
    if loose and not is_parquet(folder) and not is_csv_folder(folder):
        part: Part = open_loose_images(folder)
        rows = np.arange(len(part.labels))
    else:
        source, chosen = _select(open_source(wanted, root, labelled=wanted.selection is not None), wanted)
        part, rows = source.train, _rows_of(source.train, chosen)
    if not len(rows):
        raise TaskError(f"there are no images in '{text}' to take as --unlabelled")
    return part, rows


def _decode_unlabelled(
    part: Part, rows: Rows, others: dict[str, Decoded], size: int, memory_limit: int | None, grey: GreyRange | None
) -> Decoded:
    """Decode unlabelled images, without those that equal an image of val or test."""
    held_out = np.concatenate([others["val"].digests, others["test"].digests])
    found = decode_part(part, rows, lambda pool: pool, held_out, size, memory_limit, grey)
    if not len(found.rows):
        raise TaskError("no unlabelled image is left: all are unreadable or equal an image of val or test")
    return found


def _without_labels(part: Decoded) -> Split:
    return Split(part.pixels, torch.full((len(part.rows),), -1), Names(part.part, part.rows), part.digests)


def _unlabelled_notes(part: Decoded) -> list[str]:
    if not part.copies:
        return []
    return [f"{part.copies} unlabelled images left out: they equal images of val or test"]


def decode_part(
    part: Part,
    pool: Rows,
    choose: Callable[[Rows], Rows],
    avoid: Digests,
    size: int,
    memory_limit: int | None,
    grey: GreyRange | None,
) -> Decoded:
    """Decode what is chosen from a pool of rows; for what turns out unusable, choose again from the others.

    Args:
        part: Where the rows are from.
        pool: The rows to choose from ``(N,)``, ascending.
        choose: Takes rows and returns some of them.
        avoid: Digests of pixels that must not occur.
        size: Side length of the images.
        memory_limit: Bytes above which the images lie on disk; a quarter of the memory that is free if None.
        grey: Black and white of pictures with more than 8 bits a channel; None to refuse those.
    """
    limit = free_memory() // 4 if memory_limit is None else memory_limit
    skipped: dict[int, str] = {}
    copies = 0
    while True:
        rows = choose(pool)
        pixels, reasons, digests = _read(part, rows, size, limit, grey)
        fresh = ~np.isin(digests, avoid)
        usable = np.delete(rows, list(reasons))[fresh]
        skipped.update({int(rows[position]): reason for position, reason in reasons.items()})
        copies += int((~fresh).sum())
        if len(usable) == len(rows) or len(rows) == len(pool):
            break
        pool = np.setdiff1d(pool, np.setdiff1d(rows, usable))
    return Decoded(
        part=part,
        rows=usable,
        pixels=pixels.keep(fresh) if isinstance(pixels, StoredImages) else keep(pixels, fresh),
        digests=digests[fresh],
        skipped=tuple((part.name(row), reason) for row, reason in sorted(skipped.items())),
        copies=copies,
    )


def _read(
    part: Part, rows: Rows, size: int, limit: int, grey: GreyRange | None
) -> tuple[Pixels, dict[int, str], Digests]:
    """Read some rows into memory, or map them from disk where they would take more than ``limit`` bytes."""
    if 3 * size**2 * len(rows) > limit:
        return stored_images(part, rows, size, grey)
    pixels, reasons = read_pixels(part.pictures(rows), len(rows), size, grey)
    return pixels, reasons, pixel_digests(pixels)


def refuse_bad(skipped: Sequence[tuple[str, str]], read: int) -> None:
    """Raise a :class:`TaskError` if more than 1 % of the images could not be read."""
    total = len(skipped) + read
    if len(skipped) <= MAX_BAD_FRACTION * total:
        return
    first = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    raise TaskError(
        f"{len(skipped)} of {total} images cannot be read, more than {MAX_BAD_FRACTION:.0%}: {first}{more}. Mend or "
        "remove them, or leave them out with --allow-bad"
    )


def _check_train(train: Decoded, plan: _Plan, source: Source, shots: int | None) -> None:
    """Refuse classes that have nothing, or not enough, to train on now that all images have been looked at."""
    counts = np.bincount(train.part.labels[train.rows], minlength=len(source.classes))
    for position in plan.classes:
        if counts[position] < (shots or 1):
            raise TaskError(
                f"class '{source.classes[position]}' has {counts[position]} readable images to train on, without those "
                f"held out, fewer than the {shots or 1} needed; add images, ask for fewer shots, or choose others"
            )


def _split(part: Decoded, plan: _Plan) -> Split:
    labels = np.searchsorted(plan.classes, part.part.labels[part.rows])
    return Split(part.pixels, torch.from_numpy(labels.astype(np.int64)), Names(part.part, part.rows), part.digests)


def _copies_notes(decoded: dict[str, Decoded]) -> list[str]:
    left_out = {name: part.copies for name, part in decoded.items() if part.copies}
    notes = [f"{count} images of {name} left out: they equal held-out ones" for name, count in left_out.items()]
    for name in ("val", "test"):
        shared = int(np.isin(decoded[name].digests, decoded["train"].digests).sum())
        if shared:
            notes.append(f"{shared} images of {name} are in train too")
    return notes
