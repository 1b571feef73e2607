"""The part of a page between two marks, which a program writes."""

from __future__ import annotations

from pathlib import Path


def with_part(page: Path, begin: str, end: str, part: str) -> str:
    """The page's text with ``part`` between the marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    return before + begin + "\n" + part + "\n" + end + rest.partition(end)[2]
