"""Sequence parallelism in a run: the groups of ranks that share a sequence, and the models that support it.

Rank ``r`` of a run with ``sequence.parallel: P`` holds part ``r % P`` of the rows of group ``r // P``. The engine does
not know the groups: for ZeRO all ranks are data-parallel ranks with different tokens, and the loop needs the mean over
all ranks of the gradients of their summed losses. Passing the groups (``mpu``) would only change the divisor, and not
consistently: stages 0 to 2 of DeepSpeed 0.19.8 divide by the number of groups, stage 3, which reduces with
``reduce_scatter_coalesced``, by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.recipe.heads import heads_fault, rotary_fault
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.distributed.engine import collective_timeout


def join_sequence_group(recipe: Recipe) -> Ulysses | None:
    """Form the groups of neighbouring ranks that share a sequence; every rank calls this.

    Returns:
        The object that splits a forward pass over this rank's group; None without sequence parallelism.
    """
    if recipe.sequence.parallel == 1:
        return None
    timeout = collective_timeout(recipe.deepspeed.timeout)
    group, _ = dist.new_subgroups(recipe.sequence.parallel, timeout=timeout)
    return Ulysses(group)


def check_config(config: Any, parallel: int, attention: MethodConfig | None = None) -> None:
    """Refuse a transformers config that does not support sequence parallelism.

    Args:
        attention: The method that its layers will have.

    Raises:
        ModelError: The number of heads is not divisible, also for the method, or the rotary embedding depends on the
            sequence length.
    """
    if parallel == 1:
        return
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    fault = heads_fault(parallel, heads, kv_heads)
    fault = fault or (None if attention is None else attention.heads_fault(kv_heads, parallel))
    fault = fault or rotary_fault(getattr(text_config, "rope_parameters", None))
    if fault is not None:
        raise ModelError(f"sequence.parallel={parallel}: {fault}")


def check_shareable(model: PreTrainedModel, parallel: int) -> None:
    """Refuse a sparsified model whose result would change if each rank has only a part of the tokens.

    Raises:
        ModelError: The model mixes tokens outside attention, or :func:`check_config` refuses its config.
    """
    check_config(model.config, parallel)
    leaks = any(getattr(layer, PLAN_ATTRIBUTE).leaks_between_documents for _, layer, _ in sparse_layers(model))
    if parallel > 1 and leaks:
        raise ModelError(
            f"sequence.parallel={parallel}: {type(model).__name__} also mixes tokens outside attention (state-space, "
            "convolution or linear attention layers), where each rank would see only its own part; set it to 1"
        )
