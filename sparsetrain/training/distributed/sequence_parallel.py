"""Sequence parallelism in a run: which ranks share a sequence, and which models allow it.

Rank ``r`` of a run with ``sequence.parallel: P`` holds part ``r % P`` of the rows of group ``r // P``. The engine is
not told: to ZeRO all ranks are data-parallel ranks that hold different tokens, and the mean over them of the gradients
of their summed losses is what the loop wants from it. Handing it the groups (``mpu``) would only change by what it
divides, and not even alike: stages 0 to 2 of DeepSpeed 0.19.8 divide by the groups, stage 3, which reduces by
``reduce_scatter_coalesced``, by all ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe.heads import heads_fault, rotary_fault
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.distributed.engine import collective_timeout


def join_sequence_group(recipe: Recipe) -> Ulysses | None:
    """Form the groups of neighbouring ranks that share a sequence; every rank calls this.

    Returns:
        What splits a forward pass over the group of this rank, None where a rank has its sequences to itself.
    """
    if recipe.sequence.parallel == 1:
        return None
    timeout = collective_timeout(recipe.deepspeed.timeout)
    group, _ = dist.new_subgroups(recipe.sequence.parallel, timeout=timeout)
    return Ulysses(group)


def check_config(config: Any, parallel: int) -> None:
    """Refuse a model whose config, a transformers one, says that ranks cannot share its sequences.

    Raises:
        ModelError: its heads do not divide, or its rotary embedding depends on the length of what it sees.
    """
    if parallel == 1:
        return
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    fault = heads_fault(parallel, heads, getattr(text_config, "num_key_value_heads", None) or heads)
    fault = fault or rotary_fault(getattr(text_config, "rope_parameters", None))
    if fault is not None:
        raise ModelError(f"sequence.parallel={parallel}: {fault}")


def check_shareable(model: PreTrainedModel, parallel: int) -> None:
    """Refuse a sparsified model that would compute something else when each rank sees a part of the tokens.

    Raises:
        ModelError: it mixes tokens outside attention, or its config is refused by :func:`check_config`.
    """
    check_config(model.config, parallel)
    leaks = any(getattr(layer, PLAN_ATTRIBUTE).leaks_between_documents for _, layer, _ in sparse_layers(model))
    if parallel > 1 and leaks:
        raise ModelError(
            f"sequence.parallel={parallel}: {type(model).__name__} also mixes tokens outside attention (state-space, "
            "convolution or linear attention layers), where each rank would see its own part alone; set it to 1"
        )
