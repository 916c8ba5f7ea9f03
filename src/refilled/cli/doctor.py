"""The command ``doctor``: whether this machine can train."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import AsJson
from refilled.cli.show import console, say


def doctor(
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not contact the Hugging Face hub. Same as HF_HUB_OFFLINE=1.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, devices, speed, memory, folders, network.

    Exits with 1 if there is a problem.
    """
    from refilled.runs.doctor import examine

    found = examine(offline)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        table = Table(show_header=False)
        for heading, text in _rows(found):
            table.add_row(heading, escape(text))
        console.print(table)
        for problem in found["problems"]:
            say(f"problem: {problem}")
        if not found["problems"]:
            console.print("no problems found")
    if found["problems"]:
        raise typer.Exit(1)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "python", f"{found['python']}, {found['platform']}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    for name, part in found["extras"].items():
        installed = ", ".join(f"{package} {version}" for package, version in part["installed"].items())
        missing = f"missing: {', '.join(part['missing'])}; {part['install']}" if part["missing"] else ""
        yield f"extra {name}", "\n".join(text for text in (installed, missing) if text)
    for name, hardware in found.get("devices", {}).items():
        yield f"device {name}", hardware
    if "precision" in found:
        yield "threads", str(found["threads"])
        yield "precision", f"auto is {found['precision']['auto']} on {found['precision']['device']}"
        for name, step in found["precision"]["cpu_steps"].items():
            times = ", ".join(f"{1000 * seconds:.1f} ms in {name}" for name, seconds in step["seconds"].items())
            yield f"  step of {name}", f"{times}, on the CPU; {step['faster']} is faster"
        yield "free memory", _gib(found["free_memory"])
        root = found["data_root"]
        yield "data root", f"{root['folder']}{'' if root['exists'] else ' (does not exist)'}"
    cache = found["cache"]
    state = f"{_gib(cache['bytes'])} used, {_gib(cache['free'])} free" if cache["writable"] else "cannot be written"
    yield "cache", f"{cache['folder']}: {state}"
    hub = found["hub"]
    states = {None: "not tried", True: "reached", False: f"not reached: {hub['error']}"}
    yield "hub", f"{hub['address']}: {states[hub['reached']]}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
