"""The runs in a folder at a glance, and the log of one. It does not import torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsetrain.counted import counted
from sparsetrain.errors import CheckpointError, RecipeError
from sparsetrain.evaluation.metrics import FINISHED, METRICS_FILE, PLANNED_STEPS, Metrics, read_metrics
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.schema import TrainSection
from sparsetrain.training.output.folder_contents import enclosing_run, is_locked

LOG_FILE = "run.log"
"""The lines that a run prints, with date and time."""
PAUSE = 0.5
"""Seconds between two looks at a log."""

State = Literal["running", "finished", "stopped", "damaged"]
"""``stopped`` is a run that ``--resume`` continues; of a ``damaged`` one the recipe cannot be read."""


@dataclass(frozen=True)
class RunState:
    """A run at a glance."""

    folder: Path
    name: str
    """Of its recipe; empty where that cannot be read."""
    state: State
    step: int
    steps: int | None
    """All that it is to do; None where this follows from its tokens or data and it has not begun to train."""
    planned: str
    """The same as the recipe says it, such as ``2 epochs``; empty where that cannot be read."""
    loss: float | None
    """Of the last logged step, in nats per target token."""
    size: int
    """Bytes of all files."""
    changed: float
    """Seconds since the epoch at which something was written last."""

    @property
    def ended_early(self) -> bool:
        """Whether it is finished before its last step, by ``eval.early_stopping``."""
        return self.state == "finished" and self.steps is not None and self.step < self.steps


def list_runs(folder: Path) -> list[RunState]:
    """The runs in a folder, or below one folder in it; the last that wrote something comes first.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; runs write to runs/NAME below where they are started")
    found = {
        file.parent for pattern in ("recipe.yaml", "*/recipe.yaml", "*/*/recipe.yaml") for file in folder.glob(pattern)
    }
    found = {run for run in found if enclosing_run(run) is None}  # a checkpoint has a recipe too
    return sorted(map(state_of, found), key=lambda run: run.changed, reverse=True)


def state_of(folder: Path) -> RunState:
    """One run, by its folder."""
    size, changed = _size(folder)
    try:
        metrics = read_metrics(folder / METRICS_FILE)
    except (OSError, ValueError):
        metrics = Metrics()
    step = max((points[-1][0] for name in ("loss", FINISHED) if (points := metrics.curves[name])), default=0)
    loss = metrics.last("loss")
    state: State
    try:
        recipe = load_recipe(folder / "recipe.yaml").recipe
    except RecipeError:
        return RunState(folder, "", "damaged", step, None, "", loss, size, changed)
    state = "running" if is_locked(folder) else "finished" if metrics.last(FINISHED) else "stopped"
    recorded = metrics.last(PLANNED_STEPS)
    # The recipe first: it is that of the next steps where a finished run is to take more.
    steps = recipe.train.steps or (None if recorded is None else int(recorded))
    return RunState(folder, recipe.name or "", state, step, steps, _planned(recipe.train), loss, size, changed)


def _planned(train: TrainSection) -> str:
    if train.steps is not None:
        return counted(train.steps, "step")
    return counted(train.tokens, "token") if train.tokens is not None else f"{train.epochs:g} epochs"


def log_lines(folder: Path, *, last: int | None = None, follow: bool = False) -> Iterator[str]:
    """The lines of a run's log.

    Args:
        last: how many, from the end; None for all.
        follow: go on with those that are written, until the run ends.

    Raises:
        CheckpointError: the folder has no log.
    """
    place = folder / LOG_FILE
    if not place.is_file():
        reason = "it has no run.log yet" if (folder / "recipe.yaml").is_file() else "it is not a run folder"
        raise CheckpointError(f"{folder}: {reason}; give the folder of a run, as `sparsetrain runs` lists them")
    with place.open(encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
        yield from lines if last is None else lines[max(0, len(lines) - last) :]
        while follow:
            # Asked first: what a run writes before it ends is read once more.
            goes_on = is_locked(folder)
            yield from file
            if not goes_on:
                return
            time.sleep(PAUSE)


def _size(folder: Path) -> tuple[int, float]:
    """Bytes of all files below a folder, and when the last of them was written."""
    size, changed = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            size, changed = size + found.st_size, max(changed, found.st_mtime)
    return size, changed
