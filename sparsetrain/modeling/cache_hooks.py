"""How a layer's memory gets into a cache that transformers makes, without knowing the attention method.

A forward pre-hook of each attention layer replaces that layer's empty entry in the cache by a
:class:`~sparsetrain.modeling.cache.MemoryLayer`. It works alike in ``generate``, in pipelines and in a forward pass
with ``use_cache=True``.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sparsetrain.errors import ModelError
from sparsetrain.generation.memories import make_memory
from sparsetrain.modeling.attention.mask import STATIC
from sparsetrain.modeling.attention.plan import LayerPlan
from sparsetrain.modeling.cache import MemoryLayer, StaticMemoryLayer, shares_keys

MEMORY_ARGUMENT = "sparsetrain_memory"
"""Name under which a layer's memory travels to the attention function."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""Names of the cache among the arguments of attention layers."""

UNUSED = (
    "use_cache=False, and past_key_values is a cache, into which the whole text would be read in every step: pass "
    "use_cache=True (the config of the model may say otherwise), or leave the cache out"
)

HOOK_ATTRIBUTE = "sparsetrain_memory_hook"
UNUSED_HOOK_ATTRIBUTE = "sparsetrain_unused_cache_hook"


def keep_memory(layer: nn.Module, plan: LayerPlan) -> None:
    """Make an attention layer keep the past in a memory wherever it is handed a cache."""
    drop_memory(layer)
    if shares_keys(layer) and (plan.method is None or plan.method.memory() is None):
        return
    names = list(inspect.signature(layer.forward).parameters)
    hook = layer.register_forward_pre_hook(partial(_hand_over, plan, names), with_kwargs=True)
    setattr(layer, HOOK_ATTRIBUTE, hook)


def drop_memory(layer: nn.Module) -> None:
    """Undo :func:`keep_memory`."""
    hook = layer.__dict__.pop(HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.remove()


def _hand_over(
    plan: LayerPlan, names: list[str], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: finds the memory in the cache of the call and sends it along."""
    arguments = dict(zip(names, args, strict=False)) | kwargs
    cache = next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
    if cache is None:
        return None
    held = _memory_layer(cache, layer.layer_idx, plan)
    if held is None:
        return None
    if not torch.compiler.is_compiling():
        rows, tokens = arguments[names[0]].shape[:2]  # of the hidden states
        _check_follows(cache, layer.layer_idx, held, rows, tokens)
    return args, {**kwargs, MEMORY_ARGUMENT: held.expect()}


def _check_follows(cache: Cache, index: int, held: MemoryLayer, rows: int, tokens: int) -> None:
    """Refuse a call that does not go on from what the cache holds: of other rows, or after a pass that was broken off
    and left the layer before further than this one."""
    if held.counted and held.memory.rows not in (0, rows):
        raise ModelError(
            f"the cache holds a batch of {held.memory.rows}, and this call has one of {rows}: start again with an "
            "empty cache, or call cache.batch_repeat_interleave or cache.batch_select_indices first"
        )
    before, read = cache.layers[index - 1] if index else None, held.counted + tokens
    if isinstance(before, MemoryLayer) and before.counted > read:
        raise ModelError(
            f"with this call, layer {index - 1} has read {before.counted} tokens into the cache, and layer {index} "
            f"{read}: a pass was broken off between them; start again with an empty cache"
        )


def _memory_layer(cache: Cache, index: int, plan: LayerPlan) -> MemoryLayer | None:
    """The place of layer ``index`` in a cache, made ours if it was still empty. None where the cache keeps keys and
    values in a way of its own, which the layer then reads: quantised, offloaded, beside the state of other layers."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    held: Any = cache.layers[index]
    if isinstance(held, MemoryLayer) and held.plan is plan:
        return held
    if isinstance(held, StaticMemoryLayer):
        raise ModelError(
            "this SparseCache was made for another model, or before the model's attention method changed; make a new "
            "one"
        )
    if isinstance(held, StaticLayer):
        raise ModelError(STATIC)
    own = plan.method is not None and plan.method.memory() is not None
    if not isinstance(held, MemoryLayer):
        takes_over = type(held) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not own and (cache.offloading or not takes_over):
            return None
        if not takes_over:
            raise ModelError(
                f"{type(held).__name__} in the cache of layer {index} cannot hold what {type(plan.method).__name__} "
                "remembers; generate without cache_implementation"
            )
    if held.get_seq_length() > 0:
        raise ModelError(
            f"the cache of layer {index} holds {held.get_seq_length()} tokens of another attention method; start again "
            "with an empty cache"
        )
    memory = make_memory(plan.method, plan.window, decode=plan.decode, index=plan.index)
    if cache.offloading:
        memory.offload()
    ours = MemoryLayer(memory, plan)
    cache.layers[index] = ours
    return ours


def refuse_unused_cache(model: nn.Module) -> None:
    """Make a model refuse a call with a cache and ``use_cache=False``, as transformers' loops call it for every token
    with the whole text."""
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and each.can_generate() and UNUSED_HOOK_ATTRIBUTE not in each.__dict__:
            setattr(each, UNUSED_HOOK_ATTRIBUTE, each.register_forward_pre_hook(_check_used, with_kwargs=True))


def _check_used(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model that generates."""
    if kwargs.get("use_cache") is False and kwargs.get("past_key_values") is not None:
        raise ModelError(UNUSED)
