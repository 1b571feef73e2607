"""Pictures of runs in tests: figures are made in full, but not laid out and rendered, which takes longer than steps.

Forked ranks draw so always, and runs in the process of the tests unless the test asks for ``rendered``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from sparsetrain.durable import write_whole
from sparsetrain.evaluation import pictures
from sparsetrain.evaluation.html import svg

render, render_svg = pictures._save, svg.render


def draft(figure: Any, out: Path) -> Path:
    """Write a picture of one pixel in the place of a figure."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "png")
    write_whole(out, pixel.getvalue())
    return out


def draft_svg(figure: Any) -> str:
    """An empty picture in the place of a figure of a page."""
    return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'


def draw_drafts() -> None:
    pictures._save, svg.render = draft, draft_svg


def draw_in_full() -> None:
    pictures._save, svg.render = render, render_svg
