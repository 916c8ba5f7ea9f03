"""Mutation tests of the losses: the share of small faults in the source that ``tests/losses`` notice.

``python benchmarks/mutants.py --sample 100`` changes one operator, constant, call or return value at a time in the
files of ``MUTATED`` and runs the tests against each changed file. The tests are imported once; a process is forked for
each mutant. Results are appended to ``--results``; a second call resumes, and with ``--again`` it
repeats the mutants that survived. ``benchmarks/mutants.toml`` lists the mutants that change nothing a user can observe.
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import random
import resource
import select
import signal
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LOSSES = ROOT / "src" / "refilled" / "losses"
MUTATED = ("triplet_alignment", "mining", "local_kd", "trust", "distances")
TESTS = "tests/losses"
WALL_SECONDS = 900  # a mutant that is not done by then counts as neither killed nor alive, and is repeated
MEMORY = 10 * 2**30

Swap = Callable[[Any], None]

NEGATED = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
OPPOSITE = {"min": "max", "amin": "amax", "argmin": "argmax", "any": "all", "clamp_min": "clamp_max"}
OPPOSITE |= {other: name for name, other in OPPOSITE.items()}


class Mutant(NamedTuple):
    """One change of one file."""

    module: str
    name: str
    """Stable while the function is unchanged: its name, the old and the new text, and a number if they repeat."""

    line: int
    node: int
    """Index of the node in the order of :func:`nodes_of`."""

    variant: int


def main() -> None:
    """Run mutants, or print what is known about them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "mutants.jsonl")
    parser.add_argument("--sample", type=int, help="this many, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", choices=MUTATED, default=MUTATED)
    parser.add_argument("--again", action="store_true", help="repeat the mutants that survived")
    parser.add_argument("--seconds", type=int, default=60, help="processor time; a mutant that takes longer is killed")
    parser.add_argument("--summary", action="store_true", help="run nothing; print counts and survivors")
    options = parser.parse_args()
    mutants = [mutant for module in options.modules for mutant in mutants_of(module)]
    random.Random(options.seed).shuffle(mutants)
    mutants = mutants[: options.sample]
    equivalent = equivalents()
    if not options.summary:
        known = read(options.results)
        todo = [
            mutant
            for mutant in mutants
            if mutant.name not in equivalent
            and (mutant.name not in known or (options.again and known[mutant.name]["outcome"] == "survived"))
        ]
        run(todo, known, options)
    print(summary(mutants, read(options.results), equivalent))


def equivalents() -> dict[str, str]:
    """Return the names of the mutants that behave as the original, with the reason."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {name: reason for reason, names in tomllib.loads(text)["equivalent"].items() for name in names}


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each mutant."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def summary(mutants: list[Mutant], known: dict[str, dict[str, Any]], equivalent: dict[str, str]) -> str:
    """Return a Markdown table of counts, and the names of the survivors."""
    lines = ["| file | mutants | run | equivalent | killed | survived | killed of the others |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for module in (*MUTATED, ""):
        of_module = [mutant.name for mutant in mutants if module in ("", mutant.module)]
        same = sum(name in equivalent for name in of_module)
        counts = Counter(known[name]["outcome"] for name in of_module if name in known and name not in equivalent)
        killed, survived = counts["killed"], counts["survived"]
        share = f"{100 * killed / (killed + survived):.1f} %" if killed + survived else "-"
        lines.append(
            f"| {module or 'all'} | {len(of_module)} | {same + killed + survived} | {same} | {killed} | {survived} "
            f"| {share} |"
        )
    survivors = [m for m in mutants if m.name not in equivalent and known.get(m.name, {}).get("outcome") == "survived"]
    return "\n".join([*lines, "", *(f"{m.module}.py:{m.line}: {m.name}" for m in sorted(survivors))])


# Mutants of a file.


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    tree = ast.parse((LOSSES / f"{module}.py").read_text(encoding="utf-8"))
    found, seen = [], Counter()
    for index, (node, parent, place) in enumerate(nodes_of(tree)):
        for variant, swap in enumerate(swaps(node, parent)):
            shown = parent if isinstance(node, ast.Constant) else node
            before, saved = text_of(shown, node), dict(vars(node))
            swap(node)
            name = f"{module}.{place}: {before} -> {text_of(shown, node)}"
            vars(node).update(saved)
            seen[name] += 1
            number = f" ({seen[name]})" if seen[name] > 1 else ""
            found.append(Mutant(module, name + number, node.lineno, index, variant))
    return found


def text_of(node: ast.AST, changed: ast.AST) -> str:
    """Return the source of a node: of an ``if`` its condition, of parameters the one with the changed default."""
    match node:
        case ast.If(test=test):
            return f"if {ast.unparse(test)}"
        case ast.arguments():
            pairs = zip(node.args[len(node.args) - len(node.defaults) :], node.defaults, strict=True)
            pairs = [*pairs, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            return next(f"{argument.arg}={ast.unparse(default)}" for argument, default in pairs if default is changed)
    return ast.unparse(node)


def nodes_of(node: ast.AST, place: str = "module") -> Iterator[tuple[Any, ast.AST, str]]:
    """Yield the nodes to change, with the node around them and the name of their function.

    Not changed: annotations, decorators, imports and the texts of errors.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Import | ast.ImportFrom):
                continue
            inside = place
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = child.name if place == "module" else f"{place}.{child.name}"
            elif hasattr(child, "lineno"):
                yield child, node, place
            yield from nodes_of(child, inside)


def swaps(node: Any, parent: ast.AST) -> Iterator[Swap]:
    """Yield the changes of a node, as functions that change it in place."""
    match node:
        case ast.Compare(ops=[op]):
            for table in (NEGATED, BOUNDARY):
                if type(op) in table:
                    yield setting("ops", [table[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield setting("op", ARITHMETIC[type(op)]())
        case ast.UnaryOp(op=(ast.USub() | ast.Invert() | ast.Not()) as op):
            yield setting("op", ast.UAdd()) if isinstance(op, ast.USub) else doubling
        case ast.BoolOp(op=op):
            yield setting("op", ast.And() if isinstance(op, ast.Or) else ast.Or())
        case ast.Constant(value=bool(value)):
            if not isinstance(parent, ast.keyword):  # there, dropping the keyword does the same
                yield setting("value", not value)
        case ast.Constant(value=int(value) | float(value)):
            for other in dict.fromkeys((value + 1, value - 1, 0)):
                if other != value:
                    yield setting("value", other)
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield setting("test", ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=value) if value is not None:
            yield setting("value", ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield setting("value", ast.Constant(None))
    if isinstance(node, ast.Call):
        match node.func:
            case ast.Name(id=name) if name in OPPOSITE:
                yield setting("func", ast.Name(OPPOSITE[name], ast.Load()))
            case ast.Attribute(value=value, attr=name) if name in OPPOSITE:
                yield setting("func", ast.Attribute(value, OPPOSITE[name], ast.Load()))
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield setting("keywords", node.keywords[:index] + node.keywords[index + 1 :])


def setting(field: str, value: Any) -> Swap:
    """Return a change that sets a field of a node."""
    return lambda node: setattr(node, field, value)


def doubling(node: ast.UnaryOp) -> None:
    """Apply the operator twice, so that ``not x`` becomes the truth of x and ``~x`` becomes x."""
    node.operand = ast.UnaryOp(type(node.op)(), node.operand)


def code_of(mutant: Mutant) -> CodeType:
    """Compile the changed file."""
    file = LOSSES / f"{mutant.module}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node, parent, _ = list(nodes_of(tree))[mutant.node]
    list(swaps(node, parent))[mutant.variant](node)
    return compile(ast.fix_missing_locations(tree), str(file), "exec")


# Tests of a mutant, in a process of its own.


def install(mutant: Mutant) -> None:
    """Change the imported module in place, because the tests have imported names from it already.

    Objects that the tests made when they were imported keep their attributes.
    """
    module = importlib.import_module(f"refilled.losses.{mutant.module}")
    changed = ModuleType(module.__name__)
    exec(code_of(mutant), vars(changed))
    replace(module, changed)


def replace(old: Any, new: Any) -> None:
    """Give functions of a module or class their new code, and set its new constants."""
    for name, value in list(vars(new).items()):
        before = vars(old).get(name)
        if isinstance(value, type):
            if value.__module__ == new.__name__:
                replace(before, value)
            continue
        function, own = code_owner(value), code_owner(before)
        if isinstance(function, FunctionType) and isinstance(own, FunctionType):
            if function.__module__ != own.__module__ or function.__code__.co_filename != own.__code__.co_filename:
                continue
            if function.__code__.co_freevars == own.__code__.co_freevars:
                own.__code__, own.__defaults__ = function.__code__, function.__defaults__
                own.__kwdefaults__ = function.__kwdefaults__
            else:  # super() is no longer called
                setattr(old, name, value)
        elif isinstance(value, bool | int | float | str | tuple) and not name.startswith("__"):
            setattr(old, name, value)


def code_owner(value: Any) -> Any:
    """Return the function inside a property, a static method or a decorated function; other values unchanged."""
    value = getattr(value, "fget", value)
    return inspect.unwrap(getattr(value, "__func__", value))


class Runner:
    """A plugin of pytest that collects the tests once, and runs them in a fork for each mutant."""

    def __init__(self, mutants: list[Mutant], known: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
        self.mutants, self.options = mutants, options
        self.kills = {module: Counter() for module in MUTATED}
        for line in known.values():
            self.kills[line["module"]][line["by"]] += line["outcome"] == "killed"
        self.took: dict[str, float] = {}
        self.failed: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run the original, which must pass, then each mutant, and append a line for each."""
        original = self.outcome(session, None)
        if original["outcome"] != "survived":
            raise SystemExit(f"the tests fail without any change: {original}")
        usual = original["took"]
        print(f"{len(usual)} tests, {original['seconds']:.1f} s of processor time", flush=True)
        for number, mutant in enumerate(self.mutants, start=1):
            kills = self.kills[mutant.module]
            # Tests that killed mutants of this file first, then the quick ones.
            session.items.sort(key=lambda item: (-kills[item.nodeid], usual.get(item.nodeid, 0)))
            done = self.outcome(session, mutant)
            kills[done["by"]] += done["outcome"] == "killed"
            line = {"name": mutant.name, "module": mutant.module, "line": mutant.line}
            line |= {key: done[key] for key in ("outcome", "by", "seconds")}
            with self.options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(self.mutants)} {done['outcome']} {done['seconds']:.1f} s  {mutant.name}", flush=True)
        return True

    def outcome(self, session: Any, mutant: Mutant | None) -> dict[str, Any]:
        """Return what became of a fork of this process."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self.test(session, mutant, writing)
        os.close(writing)
        text = b""
        while ready := select.select([reading], [], [], WALL_SECONDS)[0]:
            chunk = os.read(reading, 2**16)
            text += chunk
            if not chunk:
                break
        os.close(reading)
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        by = f"signal {os.WTERMSIG(status)}"  # of a limit, or a crash
        found = json.loads(text) if text else {"passed": False, "by": by, "took": {}}
        outcome = "survived" if found["passed"] else "killed" if ready else "unknown"
        return found | {"outcome": outcome, "seconds": usage.ru_utime + usage.ru_stime}

    def test(self, session: Any, mutant: Mutant | None, writing: int) -> None:
        """Run the tests in this process until one fails, and end the process."""
        seconds = self.options.seconds
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # independent of what else the machine does
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            if mutant is not None:
                install(mutant)
        except Exception as error:
            self.failed = f"import: {error!r}"
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            if self.failed:
                break
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        answer = {"passed": self.failed is None, "by": self.failed, "took": self.took}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)


def run(mutants: list[Mutant], known: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Run the mutants."""
    import hypothesis
    import pytest

    hypothesis.settings.register_profile(
        "mutants",
        max_examples=8,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # any failure will do; do not shrink it
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutants")
    os.chdir(ROOT)
    quiet = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported before pytest starts
    pytest.main([*quiet, "-s", "-m", "not slow", TESTS], plugins=[Runner(mutants, known, options)])


if __name__ == "__main__":
    main()
