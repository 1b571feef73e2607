"""The training step of a recipe on several numbers of ranks that share each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from sparsetrain.bench.options import Count, CountOrNone, Folder, Positional, parse_lengths
from sparsetrain.bench.options import Options as AnyOptions
from sparsetrain.errors import BenchError

if TYPE_CHECKING:
    from sparsetrain.bench.scaling import ScalingCase


class Options(AnyOptions):
    """Time the training step of a recipe on 1, 2, 4, ... ranks that share each row, one row a step.

    Each number of ranks is a `bench step` of its own, on random weights and random tokens, the same for all: losses and
    norms of gradients of the first step must agree. What was measured is written after every step.

    \b
    Examples:
      sparsetrain bench scaling qwen3-8b-power-lora-1m --ranks 1,2 --lengths 131072,262144 --full-up-to 131072
      sparsetrain bench scaling qwen3-8b-power-lora-1m --ranks 8 --lengths 1048576 --output bench
    """

    recipe: Annotated[str, Positional("RECIPE")]
    """A recipe file, or the name of a shipped recipe."""
    overrides: Annotated[list[str], Positional("[KEY=VALUE]...")] = []
    """Settings laid over the recipe, such as deepspeed.stage=2."""
    ranks: str = "1,2"
    """Numbers of ranks, one a GPU, commas between."""
    lengths: str | None = None
    """Tokens in a row, commas between; by default the recipe's."""
    full_up_to: CountOrNone = 0
    """Full attention is measured too, in rows of at most so many tokens."""
    repeats: Count = 2
    """Timed steps; one of more than 20 s is timed once."""
    output: Folder = None
    """Folder for the CSV and the JSON, and for those of each number of ranks."""


def case(options: Options) -> ScalingCase:
    """The benchmark.

    Raises:
        BenchError: an option cannot be measured.
        SparsetrainError: the recipe is wrong.
    """
    from sparsetrain.bench.scaling import ScalingCase, Shared
    from sparsetrain.recipe import load_recipe

    words = [word.strip() for word in options.ranks.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise BenchError(f"--ranks {options.ranks} must be numbers of ranks with commas between, such as 1,2")
    recipe = load_recipe(options.recipe, options.overrides).recipe
    lengths = parse_lengths(options.lengths) if options.lengths else (recipe.sequence.length,)
    ways = ("recipe", "dense") if options.full_up_to else ("recipe",)
    contenders = tuple(Shared(int(word), way) for way in ways for word in dict.fromkeys(words))
    return ScalingCase(
        name="scaling",
        options=options,
        contenders=contenders,
        known=contenders,
        subject=f"A training step of {recipe.name}",
        lengths_of_rows=lengths,
        method=recipe.attention.method,
    )
