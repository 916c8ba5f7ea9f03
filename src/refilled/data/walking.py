"""Walk over folders of images: which files are pictures, which are ignored, and which are reported as unread.

Hidden files, thumbnails of file servers and systems (``@eaDir``, ``.thumbnails``, ``Thumbs.db``) and recycle bins are
ignored. A file without a suffix is a picture if its first bytes are those of one. Files with the suffix of a picture
format that cannot be read here are counted, so that none disappears unnoticed.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from refilled.data.decode import SUFFIXES, is_encoded_picture
from refilled.errors import TaskError
from refilled.words import count_of

_IGNORED = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "@recycle",
        "$recycle.bin",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
_UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".svg", ".psd", ".tga", ".ico", ".exr"}
    | {".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm", ".eps", ".pcx", ".sgi"}
)
"""Suffixes of pictures that are read only if the installed Pillow reads them."""

_REMEDIES = {".heic": "refilled[heic]", ".heif": "refilled[heic]", ".hif": "refilled[heic]"}


@dataclass
class Listing:
    """The pictures below a folder, and the number of unread files."""

    images: list[Path] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Number of files that look like pictures and cannot be read, by suffix."""
    ignored: list[Path] = field(default_factory=list)
    """Files that are not read, for any reason but that they are hidden."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is ignored."""
    return name.startswith(".") or name.casefold() in _IGNORED


def list_folders(root: Path) -> list[Path]:
    """Return the folders directly below a folder, sorted by name, without hidden ones.

    Raises:
        TaskError: The folder cannot be listed.
    """
    try:
        return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not is_hidden(entry.name)]
    except OSError as error:
        raise _unlistable(error) from None


def list_images(folder: Path) -> Listing:
    """Return the pictures below a folder at any depth, in the order of names.

    Links to folders are not followed, which avoids loops. A folder with the suffix of a picture is listed as a picture
    and reported as unreadable when it is decoded.

    Raises:
        TaskError: A folder cannot be listed.
    """
    listing = Listing()
    for path in _walk(folder):
        suffix = path.suffix.lower()
        if _is_picture(path):
            listing.images.append(path)
            continue
        listing.ignored.append(path)
        if suffix in _UNREAD_SUFFIXES:
            listing.unread[suffix] += 1
    return listing


def walk_images(folder: Path) -> Iterator[Path]:
    """Give the pictures that :func:`list_images` lists, in the same order, while it walks.

    Raises:
        TaskError: A folder cannot be listed; the pictures before it are given first.
    """
    return filter(_is_picture, _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unlistable(error)

    for place, folders, files in os.walk(folder, onerror=refuse):
        here = [*(name for name in folders if Path(name).suffix.lower() in SUFFIXES), *files]
        for name in sorted(name for name in here if not is_hidden(name)):
            yield Path(place) / name
        folders[:] = sorted(f for f in folders if Path(f).suffix.lower() not in SUFFIXES and not is_hidden(f))


def unread_notes(unread: Counter[str]) -> list[str]:
    """Return a note on files that look like pictures and were not read, if there are any."""
    if not unread:
        return []
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    extras = sorted({_REMEDIES[suffix] for suffix in unread if suffix in _REMEDIES})
    remedy = f"; pip install '{extras[0]}' reads some of them" if extras else "; convert them to JPEG or PNG"
    unread_files = count_of(unread.total(), "file looks like a picture and was", "files look like pictures and were")
    return [f"{unread_files} not read: {listed}{remedy}"]


def as_text(path: Path) -> str:
    """Return a path as text that can be encoded; bytes that are not valid UTF-8 become backslash escapes."""
    return str(path).encode(errors="backslashreplace").decode()


def loose_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder, in the order of their names, without the hidden ones."""
    return [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name) and entry.is_file()]


def fold_name(name: str) -> str:
    """Return a name in the form in which file systems compare it that ignore case and the encoding of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def has_images(folder: Path) -> bool:
    """Return whether a folder directly contains pictures."""
    try:
        return any(path.suffix.lower() in SUFFIXES and not is_hidden(path.name) for path in folder.iterdir())
    except OSError as error:
        raise _unlistable(error) from None


def _is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (not suffix and is_encoded_picture(path))


def _unlistable(error: OSError) -> TaskError:
    return TaskError(f"the folder {as_text(Path(error.filename))} cannot be listed: {error.strerror}")
