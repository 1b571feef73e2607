"""Pictures of runs in tests: each panel is drawn once, but not laid out and rendered, which takes longer than steps.

``report.png`` and the page show the same panels again; drafts leave theirs out.

Runs in the process of the tests draw so unless the test asks for ``rendered``; forked ranks draw nothing.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from sparsetrain.durable import write_whole
from sparsetrain.evaluation import pictures
from sparsetrain.evaluation.html import svg
from sparsetrain.training.output import pictures as of_run

render, report, drawn, render_svg = pictures._save, of_run.report_picture, svg.drawn, svg.render


def draft(figure: Any, out: Path) -> Path:
    """Write a picture of one pixel in the place of a figure."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "png")
    write_whole(out, pixel.getvalue())
    return out


def draft_report(out: Path, **shown: Any) -> Path:
    return draft(None, out)


def draft_drawn(draw: Any, width: float, height: float, whole: bool) -> Any:
    """A figure without axes."""
    return Figure(figsize=(width, height))


def draft_svg(figure: Any) -> str:
    """An empty picture in the place of a figure of a page."""
    return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'


def draft_panel(_: Any, out: Path, *__: Any, **___: Any) -> Path:
    return draft(None, out)


def draw_nothing() -> None:
    """Also no panels."""
    draw_drafts()
    of_run.loss_curve = of_run.attention_picture = of_run.task_picture = of_run.selection_picture = draft_panel


def draw_drafts() -> None:
    pictures._save, of_run.report_picture, svg.drawn, svg.render = draft, draft_report, draft_drawn, draft_svg


def draw_in_full() -> None:
    pictures._save, of_run.report_picture, svg.drawn, svg.render = render, report, drawn, render_svg
