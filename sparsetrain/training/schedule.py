"""The learning rate as a function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from sparsetrain.recipe.batch import steps_of_cooldown
from sparsetrain.recipe.schema import TrainSection


def share_of_peak(train: TrainSection, step: int, steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) in a run of ``steps``, as a fraction of the group's peak.

    The warmup rises linearly and reaches the peak at step ``warmup_steps - 1``; linear and cosine schedules then fall
    to ``train.min_lr_ratio`` at the last step, as wsd does in the last ``train.cooldown`` steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "wsd":
        cooldown = steps_of_cooldown(train, steps)
        progress = min(1.0, max(0, step + 1 - (steps - cooldown)) / cooldown)
        shape = 1.0 - (math.sqrt(progress) if train.cooldown_shape == "sqrt" else progress)
    else:
        progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
        shape = 1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape


def new_modules_peak(train: TrainSection) -> float:
    """Peak learning rate of the modules that the attention method adds."""
    return train.new_modules_lr or rest_peak(train)


def rest_peak(train: TrainSection) -> float:
    """Peak learning rate of what AdamW trains beside Muon; with another optimizer ``train.lr``."""
    return (train.optimizer.adam_lr if train.optimizer.name == "muon" else None) or train.lr


def peak_lr(train: TrainSection) -> tuple[str, float]:
    """Name and value of a run's peak learning rate: ``train.lr``, or that of the new modules if only they are trained
    with a separate rate."""
    if train.parameters == "new_modules" and train.new_modules_lr is not None:
        return "new_modules_lr", train.new_modules_lr
    return "lr", train.lr
