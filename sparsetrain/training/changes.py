"""Which settings of a recipe may change when a run is resumed: none on which the meaning of its checkpoint depends.

It does not import torch, so that a page of a run needs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.durable import read_bytes
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.recipe.batch import steps_of_warmup
from sparsetrain.recipe.yaml_source import entries
from sparsetrain.training.schedule import peak_lr, share_of_peak

if TYPE_CHECKING:
    from sparsetrain.training.checkpoints import TrainState

HISTORY_FILE = "history.json"
"""The file with the changes made when the run was resumed."""

FREE = (
    "name",
    "output",
    "eval",
    "checkpoint",
    "wandb",
    "tracking",
    "train.log_every",
    "train.profile",
    "train.gradient_norms",
    "data.num_workers",
)
"""Settings without influence on the weights."""
MICRO_BATCH = "train.micro_batch"
"""Settings that also matter if routers add a balance loss, which is not a mean over tokens of a micro batch."""
ROUNDING_ALONE = (
    "deepspeed",
    "sequence.parallel",
    MICRO_BATCH,
    "train.global_batch",  # may be written in another unit; the number of rows is compared with the checkpoint's
    "train.activation_checkpointing",
    "train.offload_activations",
    "train.mlp_chunk",
    "train.loss_chunk",
    "train.liger",
)
"""Settings that change the weights only by rounding, such as the micro batch and offloading."""
FROM_HERE_ON = (
    "train.lr",
    "train.new_modules_lr",
    "train.on_nonfinite",
    "train.steps",
    "train.epochs",
    "train.tokens",
    "data.on_malformed",
    MICRO_BATCH,
)
"""Settings of future steps; changes are recorded."""
CONSTANT_AT_FIRST = {"constant", "wsd"}
"""Schedules with the same rate until a cooldown: one may follow the other."""
SOURCE = re.compile(r"data\.sources\.(\d+)\.(\w+)")
WHERE_ROWS_ARE = ("path", "subset", "revision", "split", "form")
"""Settings of a source that may change, besides its column names. The resulting tokens are compared."""

REASONS = (
    (
        ("model.", "attention.", "lora", "train.parameters", "train.freeze", "train.start"),
        "the weights of the checkpoint belong to it",
    ),
    (("data.", "sequence.", "train.seed"), "the saved position in the data would mean other rows"),
    (
        ("train.schedule", "train.min_lr_ratio", "train.warmup", "train.cooldown"),
        "it determined the learning rate of earlier steps; change train.lr instead",
    ),
    (("train.optimizer", "train.max_grad_norm"), "the optimizer's state depends on it"),
)
"""Reasons why other settings must not change, by prefix of the key."""


@dataclass(frozen=True)
class Change:
    """A setting and its two values, as JSON."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"

    def at(self, step: int) -> dict[str, Any]:
        """The history entry of a run that resumes from ``step`` with this change."""
        return {"step": step, **asdict(self)}


def may_change(key: str) -> bool:
    """Whether a resumed run may change a setting."""
    return key.startswith((*FREE, *ROUNDING_ALONE)) or key in FROM_HERE_ON


def describe_change(line: dict[str, Any]) -> str:
    """A history entry as text."""
    return f"from step {line['step'] + 1} on, {Change(line['key'], line['before'], line['after'])}"


def read_history(folder: Path) -> list[str]:
    """The changes made when a folder's run was resumed, one line each; empty if there is no readable record."""
    try:
        return [describe_change(line) for line in json.loads(read_bytes(folder / HISTORY_FILE))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def changes(before: Recipe, after: Recipe, *, balanced: bool = False) -> tuple[list[Change], list[str]]:
    """The changes of a resumed run: those to record, and messages about those to refuse.

    Args:
        balanced: Whether the model's routers add a balance loss.
    """
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, after))
    free = tuple(key for key in (*FREE, *ROUNDING_ALONE) if not (balanced and key == MICRO_BATCH))
    differing = [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]
    recorded, refused = [], []
    for change in differing:
        reason = _reason(change.key, before, after)
        if reason is None:
            recorded.append(change)
        else:
            refused.append(f"{change} ({reason})")
    # The label of a source appears only in messages.
    return [change for change in recorded if not re.fullmatch(r"data\.sources\.\d+\.name", change.key)], refused


@dataclass(frozen=True)
class Resumption:
    """A resumed run whose recipe has changed."""

    before: Recipe
    changes: list[Change]

    def record(self, state: TrainState, plan: BatchPlan, recipe: Recipe) -> list[str]:
        """Add the changes to the history in a loaded state, and describe their effect.

        Args:
            state: The loaded state; its number of steps becomes that of ``plan``.
            plan: The plan of the resumed run.
        """
        lines = [change.at(state.step) for change in self.changes]
        state.history += lines
        said = [f"changed: {describe_change(line)}" for line in lines]
        old, new = self.before.train, recipe.train
        warmup = steps_of_warmup(old.warmup, state.steps)
        rates = (
            peak_lr(old)[1] * share_of_peak(old, state.step, state.steps, warmup),
            peak_lr(new)[1] * share_of_peak(new, state.step, plan.steps, plan.warmup_steps),
        )
        if lines and rates[0] != rates[1] and state.step < plan.steps:
            shape = f"; {new.schedule} is a function of all {plan.steps} steps" if state.steps != plan.steps else ""
            said.append(
                f"changed: the rate of step {state.step + 1} is {rates[1]:.2e} instead of {rates[0]:.2e}{shape}"
            )
        state.steps = plan.steps
        return said


def _reason(key: str, before: Recipe, after: Recipe) -> str | None:
    """The reason why a setting must not change; None if it may."""
    if key in FROM_HERE_ON:
        return None
    schedules = {before.train.schedule, after.train.schedule}
    if key.startswith(("train.schedule", "train.cooldown")) and schedules <= CONSTANT_AT_FIRST:
        return None
    match = SOURCE.fullmatch(key)
    if match is not None and len(before.data.sources) == len(after.data.sources):
        number, name = int(match[1]), match[2]
        sources = before.data.sources[number], after.data.sources[number]
        if name == "name":
            return None
        if (name in WHERE_ROWS_ARE or name.endswith("_field")) and all(source.path for source in sources):
            if not any(source.streaming for source in sources):
                return None
            return "rows of a streaming source at another location cannot be compared"
    return next((reason for begins, reason in REASONS if key.startswith(begins)), "earlier steps were made with it")


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    return {key.rstrip("."): leaf for key, leaf in _leaves(tree, path)}


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not tree or not isinstance(tree, dict | list):
        yield path, tree
    for name, value in entries(tree):
        yield from _leaves(value, f"{path}{name}.")
