"""Figures of matplotlib as inline SVG, whose colours are those of the page: light or dark, as the reader has it."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from sparsetrain.evaluation import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
WIDTH, HEIGHT = 4.8, 3.5
"""Inches of 72 CSS pixels: the width of a phone, and a third of that of a desktop page."""
RASTER = 144
"""Dots per inch of parts that are pixels, such as a mask."""
VARIABLES = {
    "#000000": "--ink",
    panels.INK: "--ink",
    panels.FAINT: "--faint",
    panels.PAPER: "--rule",
    "#FFFFFF": "--card",
    "#7F7F7F": "--grey",
    panels.BLUE: "--blue",
    panels.ORANGE: "--orange",
    panels.GREEN: "--green",
    panels.RED: "--red",
    panels.PURPLE: "--purple",
    panels.SKY: "--sky",
}
"""The CSS variables that stand for the colours of panels, in ``style.css``."""
_VARIABLES = {color.lower(): f"var({name})" for color, name in VARIABLES.items()}
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family: [^;]*(; )?")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied, and takes less room
    "svg.hashsalt": "sparsetrain",
    "legend.framealpha": 0.7,
    "legend.fontsize": 9,
    "axes.titlesize": 11,
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_numbers = itertools.count()


@dataclass(frozen=True)
class Picture:
    """A picture of a page."""

    svg: Markup
    title: str
    """What it shows, in words: read out in its place."""
    broad: bool = False
    """It takes the width of the page, and where that is not enough is moved sideways by itself."""


def picture(
    draw: Callable[[Any], None],
    title: str,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    whole: bool = False,
    titled: bool = False,
) -> Picture:
    """Draw into axes, or if ``whole`` into a figure, and return the SVG.

    Args:
        title: what it shows, for those who do not see it.
        width, height: inches.
        titled: put the title that ``draw`` gives the axes before it.
    """
    import matplotlib

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks is the browser's to find
        figure = drawn(draw, width, height, whole)
        own = figure.axes[0].get_title("left") if titled and figure.axes else ""
        title = f"{own}. {title}" if own else title
        _wrap(figure, width)
        return Picture(Markup(_inline(render(figure), title)), title, width > WIDTH)


def drawn(draw: Callable[[Any], None], width: float, height: float, whole: bool) -> Figure:
    """A figure of so many inches, with what ``draw`` draws into its axes, or into itself if ``whole``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure if whole else figure.subplots())
    return figure


def printable(text: str) -> str:
    """A text with U+FFFD in the place of characters that neither HTML nor XML nor UTF-8 can have."""
    return _UNPRINTABLE.sub("\ufffd", text)


def render(figure: Figure) -> str:
    """A figure as a file of SVG."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", dpi=RASTER, transparent=True, metadata={"Date": None})
    return drawn.getvalue()


def _wrap(figure: Figure, width: float) -> None:
    """Break the lines of titles that are wider than their axes; replace what cannot be drawn."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if (shown := printable(text.get_text())) != text.get_text():
            text.set_text(shown)
    for axes in figure.axes:
        share = axes.get_subplotspec().get_position(figure).width if axes.get_subplotspec() else 1.0  # type: ignore[union-attr]
        titles = {axes.get_title(place) for place in ("left", "center", "right")} - {""}
        for text in axes.findobj(Text, include_self=False):
            if text.get_text() in titles:
                _break_lines(text, width * share)
    for text in figure.texts:
        _break_lines(text, width)


def _break_lines(text: Any, width: float) -> None:
    # Letters of matplotlib's own font are about 0.62 times as wide as they are high.
    most = max(12, int(72 * width / (0.62 * text.get_fontsize())))
    lines = (textwrap.fill(line, most) for line in text.get_text().split("\n"))
    text.set_text("\n".join(lines))


def _inline(file: str, title: str) -> str:
    """The root element alone, with colours of the page, and with names that no other picture of the page has."""
    root = ElementTree.fromstring(printable(file))
    prefix = f"p{next(_numbers)}-"
    referenced = set(_REFERENCE.findall(file)) | set(re.findall(r'href="#([^"]+)"', file))
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet would be one of the whole page.
            if child.tag in (f"{{{SVG}}}style", f"{{{SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        attributes = element.attrib
        name = attributes.pop("id", None)
        if name in referenced:
            attributes["id"] = prefix + str(name)
        link = attributes.pop(f"{{{XLINK}}}href", None)
        if link is not None:
            attributes["href"] = f"#{prefix}{link[1:]}" if link.startswith("#") else link
        for key in ("style", "clip-path", "fill", "stroke"):
            if key in attributes:
                attributes[key] = _themed(_REFERENCE.sub(rf"url(#{prefix}\1)", attributes[key]))
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": title, "class": "picture"}
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    return _FONT.sub("", _COLOR.sub(lambda found: _VARIABLES.get(found[0], found[0]), style))
