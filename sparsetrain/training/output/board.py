"""Metrics of a run as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.schema import Recipe

BOARD_FOLDER = "tensorboard"
"""The folder of event files in a run folder."""


def check_board(recipe: Recipe) -> None:
    """Refuse tracking by TensorBoard where it is not installed.

    Raises:
        RecipeError: It is not; names the fix.
    """
    if "tensorboard" in recipe.tracking and util.find_spec("tensorboard") is None:
        raise RecipeError(
            "tracking: tensorboard is not installed; `pip install sparsetrain[tensorboard]`, or leave it out"
        )


class Board:
    """Writes event files; they are opened at the first value, so that a resumed run first says where it begins."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._first_step = folder, 0
        self._writer: Any = None

    def begin_at(self, step: int) -> None:
        """Hide values of this step and later ones that an earlier process has written."""
        self._first_step = step

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)
        self._open().flush()

    def image(self, name: str, path: str | Path, step: int) -> None:
        """Show a PNG."""
        from matplotlib.image import imread

        self._open().add_image(name, imread(str(path))[..., :3], step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text as it stands: indented, as TensorBoard reads Markdown."""
        self._open().add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step)
        return self._writer
