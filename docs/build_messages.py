"""Write docs/messages.md, the error messages of the package: python docs/build_messages.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
PAGE = DOCS / "messages.md"
PACKAGE = DOCS.parent / "src" / "refilled"
HEAD = """\
<!-- Written by `python docs/build_messages.py` from the source. -->

# All error messages

Each message says what is wrong, where, and how to fix it; `…` stands for a name or a number. The search of this
site finds them. [Troubleshooting](troubleshooting.md) explains the common ones.
"""


def messages(file: Path) -> Iterator[str]:
    """Yield the texts of the errors that a file raises."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        called = node.exc.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if name.endswith(("Error", "BadParameter")) and node.exc.args:
            text = " ".join(_text(node.exc.args[0]).split())
            if len(text.replace("…", "").split()) > 3:
                yield text


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return "…"


def page() -> str:
    """Return the page."""
    lines = [HEAD]
    for room in sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}):
        files = sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / room]
        texts = sorted({text for file in files for text in messages(file)}, key=str.lower)
        if texts and not room.startswith("__"):
            lines += [f"## {room.removesuffix('.py')}", "", *(f"* `` {text} ``" for text in texts), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
