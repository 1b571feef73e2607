"""A model and training steps of random numbers: of the shape of a recipe, the same in every way to take its steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsetrain.data import Row, Step, collate
from sparsetrain.data.document import IGNORE
from sparsetrain.data.sequence_part import sequence_part
from sparsetrain.plan.shape import find_shape
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.world import World


def random_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """A model of the recipe's shape and dtype, with the same weights on every rank and in every call.

    Raises:
        ModelError: the shape is not known on this machine.
    """
    fields = recipe.model.architecture
    fields = find_shape(recipe.model).as_config() if fields is None else {**fields, **recipe.model.config_overrides}
    config = AutoConfig.for_model(**{**fields, "max_position_embeddings": recipe.sequence.length})
    torch.manual_seed(recipe.train.seed)
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, recipe.model.dtype), attn_implementation="sdpa"
        )


def random_steps(vocab: int, plan: BatchPlan, world: World) -> Iterator[Step]:
    """Endless steps of one rank: every row a document of random tokens."""
    generator = np.random.default_rng(world.rank // plan.parallel)
    length = plan.sequence_length
    while True:
        micro_batches = []
        for _ in range(plan.accumulation):
            rows = []
            for _ in range(plan.micro_batch):
                tokens = generator.integers(vocab, size=length)
                rows.append(Row(tokens, np.concatenate([[IGNORE], tokens[1:]]), [length], ["random"]))
            micro_batches.append(sequence_part(collate(rows), world.rank % plan.parallel, plan.parallel))
        yield Step(micro_batches, {})
