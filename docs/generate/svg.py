"""Pieces of the drawings: SVG that is readable on a light and on a dark page, alone and inside of one."""

from __future__ import annotations

from collections.abc import Iterable

WINDOW, SINK, FAR, CHOICE, EMPTY = "#3a8fd0", "#e69f00", "#009e73", "#cc5a10", "#80808030"
FIFTH = "#c979b0"
"""Colours that differ for colour-blind readers too, on white and on black."""

STYLE = (
    "<style>svg{color:#333;font:13px system-ui,sans-serif}@media(prefers-color-scheme:dark){svg{color:#ccc}}</style>"
)
"""For a drawing that is shown alone. Inside of a page, the page's colour and type count: the hook removes it."""


def drawing(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole file. Text takes the colour of its surroundings (``currentColor``)."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", STYLE, *parts, "</svg>"]) + "\n"


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}"/>'


def cells(places: Iterable[tuple[float, float, str]], width: float, height: float) -> list[str]:
    """Rectangles of one size at ``(x, y, colour)``: a shape for each colour, so that a drawing of hundreds is short."""
    shapes: dict[str, str] = {}
    for x, y, colour in places:
        shapes[colour] = shapes.get(colour, "") + f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"
    return [f'<path d="{shape}" fill="{colour}"/>' for colour, shape in shapes.items()]


def text(x: float, y: float, words: str, anchor: str = "start", size: float = 13, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}"'
    return f'<text {place} fill="currentColor"{turn}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "currentColor", width: float = 1) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'


def legend(x: float, y: float, entries: dict[str, str], step: float = 19) -> list[str]:
    """A line for each colour."""
    parts = []
    for number, (words, colour) in enumerate(entries.items()):
        parts.append(rectangle(x, y + number * step, 11, 11, colour))
        parts.append(text(x + 18, y + number * step + 10, words))
    return parts
