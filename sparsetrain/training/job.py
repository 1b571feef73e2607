"""The immutable inputs of every stage of a run: the job, and the loaded model and data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.activity import activity
from sparsetrain.data import RowStream
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.training.output.attempt import attempt
from sparsetrain.training.output.progress import Progress
from sparsetrain.training.supervision.signals import StopSignals
from sparsetrain.world import World


@dataclass(frozen=True)
class Job:
    """A recipe, its ranks and run folder, and its outputs."""

    recipe: Recipe
    output: Path
    """The run folder."""
    world: World
    signals: StopSignals
    progress: Progress
    cleanup: ExitStack = field(default_factory=ExitStack)
    """Closing it unlocks the run folder for other processes."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.output / "checkpoints"

    def say(self, line: str) -> None:
        """Print a line for the user, on rank 0."""
        self.progress.log(line)

    def record(self, what: str, write: Callable[[], Any]) -> bool:
        """Write a report file that the run does not depend on; returns whether it succeeded.

        It counts as progress: other ranks wait while rank 0 writes one file after another.
        """
        written = attempt(f"{what} in {self.output} cannot be written", write, self.say, "the run continues without it")
        activity.moved()
        return written


@dataclass(frozen=True)
class Loaded:
    """The loaded model, tokenizer and data of a recipe."""

    model: PreTrainedModel
    """The sparsified model with its original weights."""
    tokenizer: PreTrainedTokenizerBase
    rows: RowStream
    plan: BatchPlan
