"""What every stage of a run knows, and none changes: the job, and what was loaded for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data import RowStream
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.training.output.attempt import attempt
from sparsetrain.training.output.progress import Progress
from sparsetrain.training.supervision.signals import StopSignals
from sparsetrain.world import World


@dataclass(frozen=True)
class Job:
    """A recipe, where it is carried out, and who is told of it."""

    recipe: Recipe
    output: Path
    """The run folder."""
    world: World
    signals: StopSignals
    progress: Progress
    occupied: ExitStack = field(default_factory=ExitStack)
    """Lets other processes into the run folder again when it is left."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.output / "checkpoints"

    def say(self, line: str) -> None:
        """Print a line for the user, on rank 0."""
        self.progress.log(line)

    def record(self, what: str, write: Callable[[], Any]) -> bool:
        """Write a file that reports on the run and is no part of it; returns whether that went well."""
        return attempt(f"{what} in {self.output} cannot be written", write, self.say, "the run goes on without it")


@dataclass(frozen=True)
class Loaded:
    """What a recipe names, in memory."""

    model: PreTrainedModel
    """Sparsified, its weights as they came."""
    tokenizer: PreTrainedTokenizerBase
    rows: RowStream
    plan: BatchPlan
