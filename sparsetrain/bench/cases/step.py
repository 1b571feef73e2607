"""The training step of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsetrain.bench.options import Count, Folder, Positional, parse_lengths
from sparsetrain.bench.options import Options as AnyOptions
from sparsetrain.errors import BenchError

if TYPE_CHECKING:
    from sparsetrain.bench.stepping import StepCase


class Options(AnyOptions):
    """Time the training step of a recipe, and its peak memory, beside other ways to take it.

    The model has the recipe's shape and random weights, so nothing is downloaded; rows are random tokens.

    \b
    Examples:
      sparsetrain bench step qwen3-8b-power-lora-64k --lengths 32768,131072 --ways plain,dense,flex,recipe,bare
      sparsetrain bench step my.yaml train.micro_batch=1 train.mlp_chunk=16384 --output bench
      sparsetrain bench step my.yaml train.offload_activations=true --ways recipe,ds-cpu,ds-hidden

    \b
    Several GPUs:
      deepspeed --num_gpus 2 --no_local_rank --module sparsetrain.cli bench step my.yaml deepspeed.stage=3
    """

    recipe: Annotated[str, Positional("RECIPE")]
    """A recipe file, or the name of a shipped recipe."""
    overrides: Annotated[list[str], Positional("[KEY=VALUE]...")] = []
    """Settings laid over the recipe, such as train.lr=2e-5."""
    ways: str = "recipe,dense,bare"
    """Commas between: recipe, dense (full attention instead), flex (the pattern by FlexAttention), bare (no attention:
    the limit), plain (a short SDPA script), hf and hf-bare (transformers, Liger, DeepSpeed), ds-cpu and ds-hidden
    (the recipe's step with DeepSpeed's cpu_checkpointing or CheckpointHiddenStatesOffload in the place of
    train.offload_activations). One that is named twice is measured twice."""
    lengths: str | None = None
    """Tokens in a row, commas between; by default the recipe's."""
    full_up_to: Annotated[int | None, Field(ge=0)] = None
    """Ways with full attention are measured in rows of at most so many tokens; by default in all."""
    repeats: Count = 3
    """Timed steps; one of more than 20 s is timed once."""
    output: Folder = None
    """Folder for the CSV and the JSON."""


def case(options: Options) -> StepCase:
    """The benchmark; of several ranks, each makes it.

    Raises:
        BenchError: an option cannot be measured.
        SparsetrainError: the recipe is wrong.
    """
    from sparsetrain.bench.contenders.offloads import refusal
    from sparsetrain.bench.contenders.steps import WAYS
    from sparsetrain.bench.stepping import StepCase
    from sparsetrain.recipe import load_recipe
    from sparsetrain.training.distributed.engine import init_world

    known, names = {way.name: way for way in WAYS}, [name.strip() for name in options.ways.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"--ways {unknown[0]}: there is no such way; choose from {', '.join(known)}")
    lengths = parse_lengths(options.lengths) if options.lengths else ()
    settings = [[f"sequence.length={length}"] for length in lengths] or [[]]
    recipes = [load_recipe(options.recipe, [*options.overrides, *more]).recipe for more in settings]
    if (bits := recipes[0].base_bits) != "none":
        raise BenchError(
            f"lora.quantize_base={bits}: steps are measured on random weights in the model's dtype; set it to none"
        )
    if recipes[0].preference is not None:
        raise BenchError("preference: steps are measured on random rows without pairs of answers; set it to null")
    for way in (known[name] for name in names):
        if way.offload is not None and (fault := refusal(way.offload, recipes[0])) is not None:
            raise BenchError(f"--ways {way.name}: {fault}")
    return StepCase(
        name="step",
        options=options,
        contenders=tuple(known[name] for name in names),
        known=WAYS,
        subject=f"A training step of {recipes[0].name}",
        recipes={recipe.sequence.length: recipe for recipe in recipes},
        world=init_world(recipes[0].deepspeed.timeout),
    )
