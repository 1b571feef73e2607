"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from sparsetrain.recipe.schema import TrainSection


def learning_rate(train: TrainSection, step: int, steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) in a run of ``steps`` steps.

    The warmup rises linearly and reaches ``train.lr`` at step ``warmup_steps - 1``; linear and cosine schedules then
    fall to ``train.lr * train.min_lr_ratio`` at the last step.
    """
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    shape = 1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape)
