"""Draw the picture of the README, once for light and once for dark pages: python docs/build_idea.py."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parent / "figures"
WIDTH, HEIGHT = 900, 330

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "ink": "#1f2328", "soft": "#57606a", "line": "#d0d7de", "panel": "#f6f8fa",
        "robin": "#c2410c", "wren": "#1d4ed8", "owl": "#0f766e",
    },
    "dark": {
        "ink": "#e6edf3", "soft": "#9da7b3", "line": "#3d444d", "panel": "#161b22",
        "robin": "#fb923c", "wren": "#7aa2ff", "owl": "#2dd4bf",
    },
}  # fmt: skip

# Where the teacher places images of three classes that it was never trained on, in a panel of 230 x 150.
TEACHER = {
    "robin": [(48, 46), (66, 70), (36, 76), (80, 40)],
    "wren": [(128, 58), (150, 40), (142, 82), (168, 66)],
    "owl": [(150, 128), (176, 120), (196, 134), (184, 104)],
}
# The student's places: the same relations, not the same coordinates.
STUDENT = {
    "robin": [(40, 102), (62, 118), (36, 126), (68, 94)],
    "wren": [(92, 52), (112, 36), (110, 74), (132, 56)],
    "owl": [(170, 92), (190, 76), (202, 98), (182, 112)],
}
# The share that the teacher's nearest class means give to each class, for the marked image.
BELIEF = {"robin": 0.72, "wren": 0.22, "owl": 0.06}


def text(x: float, y: float, words: str, color: str, size: int = 13, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def mark(kind: str, x: float, y: float, color: str) -> str:
    """Draw one image; each class has a shape of its own, so that colour is not needed."""
    if kind == "robin":
        return f'<circle cx="{x}" cy="{y}" r="6" fill="{color}"/>'
    if kind == "wren":
        return f'<rect x="{x - 5.5}" y="{y - 5.5}" width="11" height="11" fill="{color}"/>'
    return f'<path d="M{x} {y - 7} L{x + 7} {y + 5} L{x - 7} {y + 5} Z" fill="{color}"/>'


def line(start: tuple[float, float], end: tuple[float, float], color: str, style: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="2" {style}/>'


def panel(left: float, places: Mapping[str, list[tuple[int, int]]], theme: Mapping[str, str]) -> Iterator[str]:
    """Draw an embedding with one anchor, its positive and an impostor."""
    top = 84
    yield (
        f'<rect x="{left}" y="{top}" width="230" height="160" rx="8" fill="{theme["panel"]}" stroke="{theme["line"]}"/>'
    )
    moved = {kind: [(left + x, top + 4 + y) for x, y in spots] for kind, spots in places.items()}
    anchor, positive, impostor = moved["robin"][0], moved["robin"][1], moved["wren"][0]
    yield line(anchor, positive, theme["ink"])
    yield line(anchor, impostor, theme["ink"], 'stroke-dasharray="5 4"')
    for kind, spots in moved.items():
        for x, y in spots:
            yield mark(kind, x, y, theme[kind])
    x, y = anchor
    yield f'<circle cx="{x}" cy="{y}" r="10" fill="none" stroke="{theme["ink"]}" stroke-width="2"/>'


def relations(left: float, theme: Mapping[str, str]) -> Iterator[str]:
    """Draw what passes from teacher to student."""
    top = 92
    yield text(left, top, "1  Which image is nearer?", theme["ink"], 14, weight=600)
    robin, wren, y = theme["robin"], theme["wren"], top + 26
    yield line((left + 30, y), (left + 62, y), theme["ink"])
    yield mark("robin", left + 30, y, robin) + mark("robin", left + 62, y, robin)
    yield text(left + 82, y + 5, "<", theme["ink"], 16)
    yield line((left + 112, y), (left + 182, y), theme["ink"], 'stroke-dasharray="5 4"')
    yield mark("robin", left + 112, y, robin) + mark("wren", left + 182, y, wren)
    yield text(left, top + 80, "2  How near is each class mean?", theme["ink"], 14, weight=600)
    for row, (kind, share) in enumerate(BELIEF.items()):
        y = top + 104 + 22 * row
        yield mark(kind, left + 30, y, theme[kind])
        yield f'<rect x="{left + 48}" y="{y - 6}" width="{share * 130:.1f}" height="12" rx="2" fill="{theme[kind]}"/>'
        yield text(left + 54 + share * 130, y + 5, f"{share:.0%}", theme["soft"], 12)


def draw(theme: Mapping[str, str]) -> str:
    ink, soft = theme["ink"], theme["soft"]
    parts = [
        text(20, 34, "The teacher", ink, 18, weight=600),
        text(20, 56, "large, trained on other classes", soft),
        *panel(20, TEACHER, theme),
        text(20, 268, "It has no name for robin, wren or owl,", soft),
        text(20, 286, "but it places similar images together.", soft),
        text(318, 34, "What is passed on", ink, 18, weight=600),
        text(318, 56, "comparisons; no class of the teacher's", soft),
        *relations(318, theme),
        text(650, 34, "The student", ink, 18, weight=600),
        text(650, 56, "small, trained on your classes", soft),
        *panel(650, STUDENT, theme),
        text(650, 268, "It learns your labels, and to compare", soft),
        text(650, 286, "images as the teacher does.", soft),
    ]
    for x in (262, 606):
        parts.append(line((x, 164), (x + 30, 164), soft))
        parts.append(f'<path d="M{x + 38} 164 l-10 -6 v12 Z" fill="{soft}"/>')
    for x, kind in ((318, "robin"), (400, "wren"), (476, "owl")):
        parts += [mark(kind, x + 8, 306, theme[kind]), text(x + 22, 311, kind, ink)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        "<title>A teacher of other classes passes on how it compares images; a small student learns it</title>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    for name, theme in THEMES.items():
        (FIGURES / f"idea-{name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
