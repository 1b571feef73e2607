"""Write metrics to ``metrics.jsonl``, and to Weights & Biases if the recipe says so. Failures do not stop a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparsetrain.durable import write_whole
from sparsetrain.evaluation.metrics import BOOKKEEPING, FINISHED, METRICS_FILE
from sparsetrain.training.output.attempt import attempt
from sparsetrain.training.output.board import BOARD_FOLDER, Board
from sparsetrain.training.output.wandb_run import start_run

if TYPE_CHECKING:
    from sparsetrain.recipe.schema import Recipe


class Tracker:
    """Writes metrics, images and the summary of one run; does nothing on ranks other than 0.

    Each :meth:`log` appends one JSON object with its ``step`` to ``metrics.jsonl`` and flushes it. W&B and TensorBoard
    get its numbers. If W&B cannot be imported, reached or logged in to, a warning is printed, the run is recorded
    offline if possible, and training continues. All W&B files are in the run folder.

    Args:
        recipe: The resolved recipe; it becomes the W&B config.
        run_dir: The run folder, created if necessary.
        rank: Rank of this process.
        resume_id: W&B id of the run to continue, from its checkpoint.
        say: Prints a line for the user; standard error by default.
        remake: Creates the run folder again if it has been deleted.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: str | Path,
        *,
        rank: int,
        resume_id: str | None = None,
        say: Callable[[str], None] | None = None,
        remake: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_id = resume_id
        """W&B id of this run, for the checkpoint; None if W&B is disabled or failed, and on other ranks."""
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._remake = remake
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._board: Board | None = None
        self._rank = rank
        if rank != 0:
            return
        self._path = Path(run_dir) / METRICS_FILE
        self._open()
        self._board = Board(Path(run_dir) / BOARD_FOLDER) if "tensorboard" in recipe.tracking else None
        if "wandb" in recipe.tracking and recipe.wandb.mode != "disabled":
            self._wandb = start_run(recipe, Path(run_dir), resume_id, self._say)
            if self._wandb is not None:
                self.run_id = self._wandb.id

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers (Python, numpy, or tensors ``[1]``) at ``step``. Non-finite numbers are written as null.

        Of :data:`~sparsetrain.evaluation.metrics.BOOKKEEPING` only the file gets a line: elsewhere it would be a chart.
        """
        if self._rank != 0:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            if self._file is None or not self._path.exists():
                self._begin_anew()
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **finite}) + "\n")
                self._file.flush()
        except (OSError, ValueError) as error:
            self._warn(error)
        if charts := {name: value for name, value in values.items() if name not in BOOKKEEPING}:
            self._try("log", lambda: self._wandb.log({"step": step, **charts}))
            self._draw("log", lambda board: board.log(charts, step))

    def _open(self) -> None:
        """Open the metrics file; without it on failure."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Non-blocking: a pipe without a reader raises instead of blocking.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            self._file = os.fdopen(os.open(self._path, flags, 0o666), "a", encoding="utf-8")
        except OSError as error:
            self._file = None
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._say(f"warning: {self._path} cannot be written ({getattr(error, 'strerror', None) or error})")

    def _begin_anew(self) -> None:
        if self._file is not None:
            self._say(f"warning: {self._path} was deleted during the run, and is created again")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._remake()
        self._open()

    def image(self, name: str, path: str | Path, step: int) -> None:
        """Show a PNG."""

        def send() -> None:
            import wandb

            self._wandb.log({"step": step, name: wandb.Image(str(path))})

        self._try("show an image", send)
        self._draw("show an image", lambda board: board.image(name, path, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, as it stands."""

        def send() -> None:
            import wandb

            self._wandb.log({"step": step, name: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False)})

        self._try("show a text", send)
        self._draw("show a text", lambda board: board.text(name, text, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run in W&B (they head its table)."""
        self._try("set the summary", lambda: self._wandb.summary.update(dict(values)))

    def artifact(self, checkpoint: Path) -> None:
        """Upload a checkpoint to W&B in the background; its files are copied first, as old checkpoints are deleted."""

        def send() -> None:
            import wandb

            upload = wandb.Artifact(f"checkpoint-{self.run_id}", type="checkpoint", metadata={"step": checkpoint.name})
            upload.add_dir(str(checkpoint))
            self._wandb.log_artifact(upload, aliases=["latest", checkpoint.name])

        self._try("upload a checkpoint", send)

    def alert(self, title: str, text: str) -> None:
        """Send a W&B alert (by mail or Slack, as configured there)."""
        self._try("send an alert", lambda: self._wandb.alert(title=title, text=text))

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, the end of a finished run, and an incomplete line after a crash: a resumed run
        writes them again.

        W&B keeps the points it has received; its charts are drawn over ``step``, which may repeat.
        """
        self._draw("drop later steps", lambda board: board.begin_at(step + 1))
        if self._file is None or not self._path.is_file():
            return
        with contextlib.suppress(OSError):
            self._file.close()
        try:
            # After a crash the last character may be incomplete.
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_whole(self._path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        except OSError as error:
            self._warn(error)
        self._open()

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, waiting at most a minute for the last upload, an hour for checkpoints. Safe to call twice."""
        self._try("finish", lambda: self._wandb.finish(exit_code=exit_code))
        self._wandb = None
        self._draw("finish", lambda board: board.close())
        self._board = None
        if self._file is not None:
            with contextlib.suppress(OSError):  # write errors were reported when they occurred
                self._file.close()
            self._file = None

    def _draw(self, what: str, act: Callable[[Board], Any]) -> None:
        board = self._board
        if board is None:
            return
        if not attempt(f"TensorBoard could not {what}", lambda: act(board), self._say, "from here on it is left out"):
            self._board = None

    def _try(self, what: str, act: Callable[[], Any]) -> None:
        if self._wandb is None:
            return
        if not attempt(f"W&B could not {what}", act, self._say, f"from here on metrics go only to {self._path}"):
            self._wandb = None


def _number(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for the end of a run and for an incomplete line, as after every step."""
    try:
        found = json.loads(line)
        return math.inf if FINISHED in found else float(found["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
