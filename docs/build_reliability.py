"""Write docs/reliability.md from docs/reliability.toml: python docs/build_reliability.py."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "reliability.md"
HEAD = """\
<!-- Written by `python docs/build_reliability.py`; edit docs/reliability.toml instead. -->

# Reliability

What `refilled` promises when something goes wrong, and the tests that show it. `make test` runs all of them.
`make soak` runs them alone, with the larger numbers of repetitions; it takes up to an hour on two cores.

## Not promised

* Weights are equal bit for bit on one kind of processor, with one version of torch and one number of threads. Elsewhere
  they agree up to rounding, which training enlarges.
* A run that resumes with another number of processes agrees up to rounding.
* A teacher or a method that is a Python file runs with your rights. Code is refused only where nobody expects any: in
  weights, shards, archives and the records of runs.
* `refilled serve` listens on this machine alone by default, and has no users and no passwords.
* Windows and macOS have no machine here: the tests run on Linux, and a workflow tries the other two.

## Mutation testing

`make mutants` changes one operator, constant, call or return value at a time in five files of `refilled.losses`, and
runs `tests/losses` against each change. A mutant is killed if a test fails or 60 seconds of processor time pass. A
second call resumes; `python benchmarks/mutants.py --summary` prints the counts and the survivors.

| file | mutants | run | equivalent | killed | survived | killed of the others |
|---|---:|---:|---:|---:|---:|---:|
| `triplet_alignment` | 153 | 107 | 2 | 100 | 5 | 95.2 % |
| `mining` | 114 | 87 | 29 | 56 | 2 | 96.6 % |
| `local_kd` | 325 | 239 | 6 | 231 | 2 | 99.1 % |
| `trust` | 166 | 106 | 3 | 99 | 4 | 96.1 % |
| `distances` | 62 | 44 | 1 | 42 | 1 | 97.7 % |
| all | 820 | 583 | 41 | 528 | 14 | 97.4 % |

`benchmarks/mutants.toml` gives the reason for each equivalent mutant. 583 of 820 mutants were run, in random order.
Some of those that survived have tests since; the others are not known to matter.

## Promised
"""


def page() -> str:
    """Return the page."""
    rows = tomllib.loads((DOCS / "reliability.toml").read_text(encoding="utf-8"))["rows"]
    return (
        HEAD
        + "".join(f"\n{line}" if line else "\n" for name, row in rows.items() for line in section(name, row))
        + "\n"
    )


def section(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a row."""
    yield f"### {name}. {row['fault']}"
    yield ""
    yield row["promise"]
    if "repetitions" in row:
        usual, soak = row["repetitions"]
        yield f"Repeated: {usual:,} in `make test`, {soak:,} in `make soak` ({row['unit']})."
    yield ""
    for test in row["tests"]:
        file, _, function = test.partition("::")
        yield f"* [{function.rpartition('::')[2].removeprefix('test_').replace('_', ' ')}](../tests/{file})"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
