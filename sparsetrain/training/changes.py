"""What the recipe of a resumed run may change: nothing that decides what its checkpoint means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.recipe.batch import steps_of_warmup
from sparsetrain.training.checkpoints import TrainState
from sparsetrain.training.schedule import peak_lr, share_of_peak

FREE = ("name", "output", "eval", "checkpoint", "wandb", "train.log_every", "data.num_workers")
"""Decides nothing about the weights."""
MICRO_BATCH = "train.micro_batch"
"""Decides more where routers add a balance loss: that of a micro batch is no mean over its tokens."""
ROUNDING_ALONE = (
    "deepspeed",
    "sequence.parallel",
    MICRO_BATCH,
    "train.global_batch",  # said another way, or said at last: its rows are compared with those of the checkpoint
    "train.activation_checkpointing",
    "train.offload_activations",
    "train.mlp_chunk",
    "train.loss_chunk",
    "train.liger",
)
"""Decides them by rounding alone, as other devices need: how the batch is cut and where things are kept."""
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
"""Steers the steps to come, and is recorded."""
SOURCE = re.compile(r"data\.sources\.(\d+)\.(\w+)")
WHERE_ROWS_ARE = ("path", "subset", "revision", "split", "form")
"""Of a source, beside the names of its columns. The tokens that come of it are compared."""

REASONS = (
    (("model.", "attention.", "lora", "train.parameters"), "the weights of the checkpoint belong to it"),
    (("data.", "sequence.", "train.seed"), "the position in the data stands for other rows"),
    (
        ("train.schedule", "train.min_lr_ratio", "train.warmup"),
        "it shaped the rate of the steps that were taken; train.lr may change instead",
    ),
    (("train.optimizer", "train.max_grad_norm"), "the optimizer's state was made with it"),
)
"""Why the rest must stay, by how its keys begin."""


@dataclass(frozen=True)
class Change:
    """A setting and its two values, as JSON."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"

    def at(self, step: int) -> dict[str, Any]:
        """The line of the history of a run that goes on from ``step`` with it."""
        return {"step": step, **asdict(self)}


def may_change(key: str) -> bool:
    """Whether a resumed run may change a setting."""
    return key.startswith((*FREE, *ROUNDING_ALONE)) or key in FROM_HERE_ON


def describe_change(line: dict[str, Any]) -> str:
    """A line of the history for a reader."""
    return f"from step {line['step'] + 1} on, {Change(line['key'], line['before'], line['after'])}"


def changes(before: Recipe, after: Recipe, *, balanced: bool = False) -> tuple[list[Change], list[str]]:
    """What a resumed run changes: what is to be recorded, and lines about what is to be refused.

    Args:
        balanced: the model's routers add a balance loss.
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
    # The label of a source, which only messages show.
    return [change for change in recorded if not re.fullmatch(r"data\.sources\.\d+\.name", change.key)], refused


@dataclass(frozen=True)
class Resumption:
    """A run that goes on by a recipe with some changes."""

    before: Recipe
    changes: list[Change]

    def record(self, state: TrainState, plan: BatchPlan, recipe: Recipe) -> list[str]:
        """Add the changes to the history that a loaded state carries on, and say what they come to.

        Args:
            state: as loaded; its steps become those of ``plan``.
            plan: of the run that goes on.
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
    """Why a setting must stay; None where it may change."""
    if key in FROM_HERE_ON:
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
            return "rows of a streaming source cannot be compared with those that it had elsewhere"
    return next((reason for begins, reason in REASONS if key.startswith(begins)), "the steps before were taken with it")


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    return {key.rstrip("."): leaf for key, leaf in _leaves(tree, path)}


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not tree or not isinstance(tree, dict | list):
        yield path, tree
    for name, value in pairs:
        yield from _leaves(value, f"{path}{name}.")
