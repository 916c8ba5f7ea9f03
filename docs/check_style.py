"""Refuse turns of phrase that the house style (CONTRIBUTING.md) replaces: python docs/check_style.py."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

CHECKED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs",
    "examples",
    "benchmarks",
    "src",
    "tests",
)
"""Files and folders."""

EXEMPT = ("docs/check_style.py", "tests/docs/test_style.py")
_SUFFIXES = {".md", ".py", ".toml"}

TURNS: tuple[tuple[str, str], ...] = (
    (r"\b(?:ever )?so many\b", "this many, or the number of"),
    (
        r"\b(?:images?|shots?|positives?|tasks?|seeds?|dots?|queries|steps|GFLOP|bits|bytes|seconds) an? "
        r"(?:class|species|step|seed|task|batch|run|gigabyte|stage|pass|message|parameter|channel|image|second|minute)"
        r"\b(?! of)",
        "per class, per step, ...",
    ),
    (r"\bgo(?:es)? on(?! \w*(?:to|with the stage))\b", "resume, or continue"),
    (r"\bgone on with\b", "resumed"),
    (r"\b(?:is|are|was) at it\b", "holds the lock, or is working on it"),
    (r"\b(?:of )?one's own\b", "your own, or custom"),
    (r"\blikewise\b", "also, or in the same way"),
    (r"\b[Bb]esides\b", "also, or in addition to"),
    (r"\bin (?:the )?place of\b", "instead of"),
    (r"\b(?:begun|made|embeds?|computed) anew\b", "again"),
    (r"\bwhat is there\b", "what exists, or a list of it"),
    (
        r"(?<![Tt]here )\b(?:is|are) no "
        r"(?:class|file|fraction|image|label|number|part|picture|range|sample|text|word)(?:s|es)?\b",
        "is not a ..., or are not ...",
    ),
    (r"\bfor ever\b(?! so)", "forever, or name what blocks"),
    (r"\bpassed over\b", "ignored, or left out"),
    (r"\bin the one and\b", "in the first and ... in the second"),
    (r"; [^;:]+ if None\b", "None: ..., as a sentence of its own"),
    (r'"""Digest (?:the|what|each|class)\b', "Return a digest of ..."),
    (r"\bto speak of\b", "worth mentioning; give the number instead"),
    (r'(?:"""|^\s*#\s)(?:Say|Tell) (?:what|in|which|how|whether|where|that|if)\b', "Return ..., or Print ..."),
)
"""Patterns, and what to write instead."""


def checked_files() -> Iterator[Path]:
    """Return the files to check, in order."""
    for name in CHECKED:
        place = ROOT / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        yield from (
            file
            for file in files
            if file.suffix in _SUFFIXES and str(file.relative_to(ROOT)) not in EXEMPT and "_build" not in file.parts
        )


def faults_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Return the number of the line, the words found, and what to write instead.

    The right column of the table of house style quotes what it refuses; such lines are left out.
    """
    quoted = False
    for number, line in enumerate(text.splitlines(), start=1):
        quoted = line.startswith("| write | not |") or (quoted and line.startswith("|"))
        if quoted:
            continue
        for pattern, instead in TURNS:
            for found in re.finditer(pattern, line):
                yield number, found.group().strip(), instead


def main() -> int:
    """Print every fault; return 1 if there are any."""
    faults = 0
    for file in checked_files():
        for number, words, instead in faults_in(file.read_text(encoding="utf-8")):
            print(f"{file.relative_to(ROOT)}:{number}: '{words}': write {instead}")
            faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
