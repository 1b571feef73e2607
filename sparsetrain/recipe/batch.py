"""Batch arithmetic: micro batch x accumulation x ranks = global batch, and the number of steps that follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from sparsetrain.counted import counted
from sparsetrain.errors import RecipeError
from sparsetrain.recipe.heads import attention_heads, shares_heads
from sparsetrain.recipe.schema import MOST_SHARING, Recipe, TrainSection


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are divided among ranks and forward passes."""

    micro_batch: int
    """Rows in one forward pass of one rank."""
    accumulation: int
    """Forward passes of one rank in one step."""
    ranks: int
    """Data-parallel processes; with ``parallel`` above 1, groups of processes."""
    sequence_length: int
    """Tokens in a row."""
    parallel: int = field(default=1, kw_only=True)
    """Processes that share each row."""

    @property
    def global_batch_sequences(self) -> int:
        """Rows in one step over all ranks."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step over all ranks, counting every row as full."""
        return self.global_batch_sequences * self.sequence_length

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of a micro batch that one rank holds, counting every row as full."""
        return math.ceil(self.sequence_length * self.micro_batch / self.parallel)

    def with_steps(self, steps: int, warmup_steps: int = 0) -> BatchPlan:
        """The plan for ``steps`` steps of this shape."""
        return BatchPlan(**asdict(self), steps=steps, warmup_steps=warmup_steps)

    def describe(self) -> str:
        """``2 rows x 4 accumulation x 2 ranks = 16 rows = 32,768 tokens a step``."""
        return (
            f"{counted(self.micro_batch, 'row')} x {self.accumulation} accumulation x "
            f"{_ranks(self.ranks, self.parallel)} = "
            f"{counted(self.global_batch_sequences, 'row')} = {self.tokens_per_step:,} tokens a step"
        )


@dataclass(frozen=True)
class BatchPlan(BatchShape):
    """The batch of every step, and the number of steps."""

    steps: int
    """Optimizer steps of the run."""
    warmup_steps: int
    """Steps over which the learning rate rises."""

    def describe(self) -> str:
        """The batch arithmetic in one line: ``... = 32,768 tokens a step; 30 steps = 983,040 tokens``."""
        return f"{super().describe()}; {counted(self.steps, 'step')} = {self.steps * self.tokens_per_step:,} tokens"


def batch_shape(recipe: Recipe, ranks: int, heads: tuple[int, int] | None = None) -> BatchShape:
    """The batch shape, with the accumulation that gives the recipe's global batch on ``ranks`` ranks.

    Without a global batch in the recipe there is no accumulation, and the batch grows with the ranks. Ranks that share
    a sequence count as one.

    Args:
        heads: The model's query and key/value heads, for what an error suggests; by default those of its config, if it
            is on this machine.

    Raises:
        RecipeError: The global batch does not divide evenly, or ``sequence.parallel`` does not divide the ranks; names
            the nearest values that do.
    """
    train, length, parallel = recipe.train, recipe.sequence.length, recipe.sequence.parallel
    if ranks % parallel:
        raise RecipeError(_undivided_ranks(parallel, ranks, heads or attention_heads(recipe.model)))
    ranks //= parallel
    rows = train.global_batch_sequences
    if train.global_batch_tokens is not None:
        rows = train.global_batch_tokens // length
    rows = train.micro_batch * ranks if rows is None else rows
    once = train.micro_batch * ranks
    if rows % once:
        raise RecipeError(_indivisible(recipe, ranks, rows))
    return BatchShape(train.micro_batch, rows // once, ranks, length, parallel=parallel)


def plan_batch(recipe: Recipe, ranks: int, rows_per_epoch: int | None = None) -> BatchPlan:
    """Resolve the batch, the steps and the warmup of a run on ``ranks`` ranks.

    Args:
        recipe: The recipe.
        ranks: Number of processes of the run.
        rows_per_epoch: Rows in one pass over the data; needed only for ``train.epochs``.

    Raises:
        RecipeError: The global batch does not divide evenly, the warmup is longer than the run, or ``train.epochs`` is
            given without ``rows_per_epoch``.
    """
    shape = batch_shape(recipe, ranks)
    train = recipe.train
    if train.steps is not None:
        steps = train.steps
    elif train.tokens is not None:
        steps = -(-train.tokens // shape.tokens_per_step)
    elif train.epochs is not None and rows_per_epoch is not None:
        steps = max(1, math.ceil(train.epochs * rows_per_epoch / shape.global_batch_sequences))
    else:
        raise RecipeError("train.epochs needs a source whose rows can be counted; give train.steps or train.tokens")
    warmup, cooldown = steps_of_warmup(train.warmup, steps), steps_of_cooldown(train, steps)
    if warmup + cooldown > steps:
        raise RecipeError(
            f"train.warmup and train.cooldown take {warmup} and {cooldown} steps of a run that has {steps}; lower one "
            "of them"
        )
    return shape.with_steps(steps, warmup)


def steps_of_cooldown(train: TrainSection, steps: int) -> int:
    """The number of steps at the end of a run of ``steps`` in which the rate of ``wsd`` falls; 0 of other schedules."""
    if train.schedule != "wsd":
        return 0
    return int(train.cooldown) if train.cooldown >= 1 else max(1, round(train.cooldown * steps))


def steps_of_warmup(warmup: float, steps: int) -> int:
    """The number of warmup steps that ``train.warmup`` gives in a run of ``steps`` steps.

    Raises:
        RecipeError: The warmup is longer than the run.
    """
    if warmup > steps:
        raise RecipeError(
            f"train.warmup={warmup:g} steps is longer than the run, which has {steps} steps; make it a fraction"
        )
    if warmup >= 1 or warmup == 0:
        return int(warmup)
    return max(1, round(warmup * steps))


def _indivisible(recipe: Recipe, ranks: int, rows: int) -> str:
    train, length = recipe.train, recipe.sequence.length
    once = train.micro_batch * ranks
    field, unit = (
        ("global_batch_sequences", 1) if train.global_batch_tokens is None else ("global_batch_tokens", length)
    )
    nearest = [multiple * once * unit for multiple in (rows // once, rows // once + 1) if multiple]
    fixes = [f"train.{field}={' or '.join(str(value) for value in nearest)}"]
    micro_batches = [
        size for size in range(1, min(rows // ranks, 2 * train.micro_batch) + 1) if rows % (size * ranks) == 0
    ]
    if micro_batches:
        best = min(micro_batches, key=lambda size: (abs(size - train.micro_batch), size))
        fixes.append(f"train.micro_batch={best}")
    return (
        f"the global batch of {counted(rows, 'row')} (train.{field}={rows * unit}) is not a multiple of "
        f"train.micro_batch={train.micro_batch} x {_ranks(ranks, recipe.sequence.parallel)} = {counted(once, 'row')}; "
        f"{' works, and so does '.join(fixes)}{' works' if len(fixes) == 1 else ''}"
    )


def _undivided_ranks(parallel: int, ranks: int, heads: tuple[int, int] | None) -> str:
    fitting = [size for size in range(1, min(ranks, MOST_SHARING) + 1) if ranks % size == 0]
    if heads is not None:
        fitting = [size for size in fitting if shares_heads(size, *heads)]
    unknown = " (if the model's heads can be divided so)" if heads is None and len(fitting) > 1 else ""
    fixes = f"set it to {' or '.join(map(str, fitting))}{unknown}, or start a multiple of {parallel} ranks"
    return f"sequence.parallel={parallel} ranks that share a sequence do not divide {counted(ranks, 'rank')}; {fixes}"


def _ranks(ranks: int, parallel: int) -> str:
    return counted(ranks, "rank") if parallel == 1 else f"{counted(ranks, 'group')} of {parallel} ranks"
