"""What a page is made of, and how it becomes HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sparsetrain.durable import write_whole
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.base import Rows
from sparsetrain.evaluation.html.svg import Picture, printable
from sparsetrain.version import __version__

OURS = b'<meta name="generator" content="sparsetrain '
"""Near the beginning of every page."""


@dataclass(frozen=True)
class Table:
    """A table of a page."""

    caption: str
    rows: Rows
    """Its header first."""
    folded: bool = False
    """Shown when the reader asks for it."""
    words: bool = False
    """Cells are texts rather than numbers."""


@dataclass
class Section:
    """A part of a page: sentences, then pictures, then tables."""

    heading: str
    about: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: tuple[str, str] | None = None
    """A caption and a text in a fixed width, folded."""

    anchor: str = ""
    """Its address in the page, which the page gives it."""

    @contextmanager
    def saying(self, fault: str) -> Iterator[None]:
        """A sentence in the place of what cannot be made: results and drawings of other packages raise anything."""
        try:
            yield
        except Exception as error:
            self.about.append(f"{fault} ({type(error).__name__}: {error}).")

    def draw(self, make: Callable[[], Picture]) -> None:
        """Add a picture; a sentence in its place where it cannot be drawn."""
        with self.saying("A picture cannot be drawn"):
            self.pictures.append(make())


@dataclass
class Page:
    """A page."""

    title: str
    lead: str
    """A sentence below the title."""
    facts: list[tuple[str, str, str]]
    """Name, value and a remark of each number at the top."""
    sections: list[Section]
    notes: list[str] = field(default_factory=list)
    """What is missing."""

    def html(self) -> str:
        """The page as one file."""
        for number, section in enumerate(self.sections):
            words = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-")
            taken = {other.anchor for other in self.sections[:number]}
            section.anchor = words if words and words not in taken else f"section-{number}"
        return printable(_template().render(page=self, version=__version__, style=_file("style.css")))

    def write(self, file: Path) -> Path:
        """Write the page, over an earlier one but over nothing else.

        Raises:
            CheckpointError: the file is there and is no page of ours.
            OSError: it cannot be written.
        """
        refuse_over(file)
        write_whole(file, self.html())
        return file


def refuse_over(file: Path) -> None:
    """Refuse to write a page over anything but an earlier page.

    Raises:
        CheckpointError: the file is there and is no page of ours.
    """
    if file.exists() and not (file.is_file() and OURS in file.read_bytes()[:1000]):
        raise CheckpointError(f"{file} exists already and is no page of sparsetrain; name another file")


def size(count: float) -> str:
    """Bytes in decimal units: ``10.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def significant(value: float) -> str:
    """A number of four digits: ``0.9750``, ``12.35``, ``45,679``."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def short_labels(labels: Sequence[str], most: int = 30) -> dict[str, str]:
    """Labels that fit into a picture, all different, as matplotlib is to be given them.

    It would leave one that begins with ``_`` out of a legend, and set what is between two dollars as a formula.
    """
    found: dict[str, str] = {}
    for label in labels:
        short = label if len(label) <= most else f"{label[: most - 9]}…{label[-8:]}"
        short = f"\u200b{short}" if short.startswith("_") else short
        short = short.replace("$", "\\$")
        while short in found.values():
            short += "*"
        found[label] = short
    return found


def _file(name: str) -> str:
    from importlib import resources

    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    import jinja2

    # Whatever comes from a run is escaped. A name that the template does not know is an error.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html.jinja"))
