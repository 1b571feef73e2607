"""The attention function transformers calls for every layer of a sparsified model.

transformers dispatches attention by name: a layer has rotated its queries and keys and updated its cache, then calls
the function registered under ``config._attn_implementation``. Ours finds out which keys belong to which document, and
hands the rest to the layer's method. No mask over queries and keys is ever built.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sparsetrain_kernels.dense import causal_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sparsetrain.errors import ModelError
from sparsetrain.methods.memory import Memory
from sparsetrain.modeling.attention.call import AttentionCall, parse_call
from sparsetrain.modeling.attention.mask import mask_of_requests
from sparsetrain.modeling.attention.name import ATTENTION_NAME
from sparsetrain.modeling.attention.padding import Attend, attend_padded, left_padding
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.ulysses import Ulysses

BROKEN_OFF = "a pass was broken off in the attention of this cache; start again with an empty cache"


def registered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sparsetrain_ulysses: Ulysses | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' ``AttentionInterface`` calls it.

    Args:
        sparsetrain_ulysses: where ranks share the sequence, what splits the call over them.
        kwargs: what :func:`~sparsetrain.modeling.attention.call.parse_call` reads.

    Returns:
        The output ``[B, N, Hq, D]``, and None for the attention weights.

    Raises:
        ModelError: the layer has no plan, or is asked for what is not in it.
    """
    plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} has no attention method; call sparsetrain.sparsify(model, ...) first"
        )
    call = parse_call(plan, module, query, key, value, attention_mask, **kwargs)
    if sparsetrain_ulysses is not None:
        return sparsetrain_ulysses(attend_call, module, call), None
    return attend_call(module, call), None


def attend_call(module: nn.Module, call: AttentionCall) -> Tensor:
    """The output of a layer, ``[B, N, Hq, D]``.

    Raises:
        ModelError: the rows are not what a layer of this plan can read.
    """
    plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE)
    if plan.method is None:
        attend: Attend = partial(causal_attention, window=plan.window, **call.settings)
    else:
        attend = partial(plan.method.attend, module, **call.settings)
        if plan.method.pass_input is not None and call.planned is not None and call.memory is None:
            attend = partial(attend, **{plan.method.pass_input: call.planned})
        if plan.window is not None and call.memory is None:
            _check_cache_is_whole(plan, call)
    if call.memory is not None:
        out = _attend_with_memory(module, attend, call, call.memory)
    elif call.padding is not None:
        out = attend_padded(attend, call, call.padding)
    else:
        out = _attend_packed(attend, call)
    return out.transpose(1, 2).contiguous()


def _check_cache_is_whole(plan: LayerPlan, call: AttentionCall) -> None:
    """A replaced sliding layer reads far back, but the cache transformers makes for it forgets what left the window."""
    if call.tokens == call.keys:
        return
    if call.padding is not None:
        seen = call.padding.shape[1]
    else:
        seen = int(call.position_ids.max()) + 1 if call.position_ids is not None else call.keys
    if seen > call.keys:
        raise ModelError(
            f"layer {plan.index} no longer uses its sliding window of {plan.window} tokens, but the cache kept only "
            "that; pass past_key_values=transformers.DynamicCache()"
        )


def _attend_with_memory(module: nn.Module, attend: Attend, call: AttentionCall, memory: Memory) -> Tensor:
    """Attention of a layer that remembers the past by itself: the keys are those of this call only."""
    starts = None
    # In generation, a row that has begun has no more padding: nothing has to be read from the device. Of width 1, the
    # mask is that of a step with a SparseCache.
    step = call.padding is not None and (call.padding.is_cuda or call.padding.shape[1] == 1)
    if call.padding is not None and not (call.tokens == 1 and memory.started and step):
        ends_early = ~call.padding[:, -1] & call.padding.any(dim=1)
        if memory.paged and memory.rows == 0 and bool(ends_early.any()):
            memory.fault = (
                "the batch was padded on the right, and what follows would see the padding; pad on the left to generate"
            )
            return attend_padded(attend, call, call.padding)
        starts = left_padding(call, call.padding)
    elif call.padding is None and call.tokens > 1:
        documents = call.documents()
        if documents is not None and any(cu_seqlens.numel() > 2 for cu_seqlens in documents):
            fault = "packed documents cannot share a key/value cache; pass use_cache=False"
            if call.caches or memory.rows or not memory.paged:
                raise ModelError(fault)
            memory.fault = fault
            return _attend_packed(attend, call)
    options = {**call.settings, **call.extra}
    if not (torch.is_grad_enabled() and call.query.requires_grad and memory.rows):
        return _attend_whole(module, call, memory, starts, options)
    with torch.no_grad():
        out = _attend_whole(module, call, memory, starts, options)
    remembered: Tensor = _Remembered.apply(out, call.query)
    return remembered


def _attend_whole(
    module: nn.Module, call: AttentionCall, memory: Memory, starts: list[int] | None, options: dict[str, Any]
) -> Tensor:
    """What the memory gives for a call, ``[B, Hq, N, D]``. If it is broken off, the memory is of no more use: nobody
    knows how much of the call it holds."""
    arguments = (module, call.query, call.key, call.value)
    # Nothing runs while a step is compiled or captured.
    if torch.compiler.is_compiling() or (call.query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return memory.attend(*arguments, starts=starts, **options)
    try:
        return memory.attend(*arguments, starts=starts, **options)
    except BaseException:
        memory.fault = memory.fault or BROKEN_OFF
        raise


class _Remembered(torch.autograd.Function):
    """The output of attention with a memory, which keeps no graph of the past: there is no gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise ModelError("a key/value cache keeps no gradients; pass use_cache=False to train")


def _attend_packed(attend: Attend, call: AttentionCall) -> Tensor:
    """Attention of rows without padding, each of one document or of several."""
    if call.cu_seqlens is not None and call.rows > 1:
        raise ModelError(f"cu_seqlens describes one packed row, but the batch has {call.rows}; join the rows into one")
    documents = call.documents()
    if documents is None:
        if call.packed:
            raise ModelError(
                "position_ids restart, and the model's mask keeps the documents apart, but its attention is not told "
                "where they end; pass it cu_seqlens"
            )
        return attend(call.query, call.key, call.value, cu_seqlens=None, q_start=None, **call.extra)

    several = any(cu_seqlens.numel() > 2 for cu_seqlens in documents)
    if call.keys > call.tokens or (several and call.caches):
        raise ModelError("packed documents cannot share a key/value cache; pass use_cache=False")
    if len(documents) == 1:
        # Cut out and joined again, it would be copied nine times, forward, recomputed and backward.
        return attend(call.query, call.key, call.value, cu_seqlens=documents[0], q_start=None, **call.extra)
    rows = []
    for i, cu_seqlens in enumerate(documents):
        q, k, v = (tensor[i : i + 1] for tensor in (call.query, call.key, call.value))
        own = {name: tensor[i : i + 1] for name, tensor in call.extra.items()}
        rows.append(attend(q, k, v, cu_seqlens=cu_seqlens, q_start=None, **own))
    return torch.cat(rows)


AttentionInterface.register(ATTENTION_NAME, registered_attention)
AttentionMaskInterface.register(ATTENTION_NAME, mask_of_requests)
