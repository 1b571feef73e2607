"""The attention function transformers calls for every layer of a sparsified model.

transformers dispatches attention by name: a layer has rotated its queries and keys and updated its cache, then calls
the function registered under ``config._attn_implementation``. Ours finds out which keys belong to which document, and
hands the rest to the layer's method. No mask over queries and keys is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sparsetrain_kernels.dense import causal_attention
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Method
from sparsetrain.methods.memory import Memory
from sparsetrain.modeling.documents import documents_of, explicit_documents
from sparsetrain.modeling.mask import MaskRequest, mask_of_requests, received
from sparsetrain.modeling.ulysses import Ulysses

ATTENTION_NAME = "sparsetrain"
"""The name in transformers' registries. Names with ``flash``, ``sdpa``, ``flex`` or ``/`` would be routed elsewhere."""

PLAN_ATTRIBUTE = "sparsetrain_plan"
"""Where an attention module keeps its :class:`LayerPlan`."""

HARMLESS_ARGUMENTS = frozenset(
    {
        *("position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict"),
        *("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        *("output_hidden_states", "output_router_logits", "num_items_in_batch"),
    }
)
"""What models pass down besides what this function reads: bookkeeping, and other spellings of the documents."""

Attend = Callable[..., torch.Tensor]


def registered_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sparsetrain_ulysses: Ulysses | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """:func:`attention_forward`, or what ``sparsetrain_ulysses`` makes of it where ranks share the sequence.

    Args:
        attention_mask: the padding, and the request of :func:`~sparsetrain.modeling.mask.mask_of_requests`.

    Raises:
        ModelError: the layer has no plan, or is asked for what is not in it.
    """
    plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} has no attention method; call sparsetrain.sparsify(model, ...) first"
        )
    padding, request = received(attention_mask)
    _check_window(plan, module, request, kwargs.pop("sliding_window", None))
    if sparsetrain_ulysses is None:
        packed = request is not None and request.packed
        return attention_forward(module, query, key, value, padding, packed=packed, **kwargs)
    extra = plan.method.extra_inputs if plan.method is not None else frozenset()
    return sparsetrain_ulysses(attention_forward, module, query, key, value, padding, extra_inputs=extra, **kwargs)


@dataclass(frozen=True)
class LayerPlan:
    """What :func:`~sparsetrain.modeling.sparsify` decided for one attention layer."""

    index: int
    """Index of the decoder layer."""
    method: Method | None
    """How the layer attends; None where it stays as the model made it."""
    window: int | None
    """Sliding window in tokens the model gives this layer, its own token included."""
    leaks_between_documents: bool
    """The model also mixes tokens outside attention (state-space or convolution layers), which packing cannot stop."""


def _check_window(plan: LayerPlan, module: nn.Module, request: MaskRequest | None, window: int | None) -> None:
    """Refuse a sliding window that is not the layer's: models ask for it in the call, in the mask, or in both."""
    name = type(module).__name__
    if request is not None:
        if window is not None and window != request.window:
            raise ModelError(
                f"{name} asks for a sliding window of {window} tokens in layer {plan.index}, and its mask for "
                f"{request.window}: which is meant cannot be told; not supported"
            )
        window = request.window
    if window != plan.window:
        raise ModelError(
            f"layer {plan.index} was built with a sliding window of {plan.window} tokens, but {name} asks for {window} "
            "in its call or its mask; not supported"
        )


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    packed: bool = False,
    sparsetrain_memory: Memory | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' ``AttentionInterface`` calls it.

    Args:
        module: the attention module; :func:`~sparsetrain.modeling.sparsify` has left its plan on it.
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]``; with a cache ``M > N``.
        attention_mask: bool ``[B, M]``, False on padding; None without padding.
        scaling: factor on the logits; by default ``D ** -0.5``.
        dropout: must be 0.
        softcap: soft cap of the logits (Gemma-2).
        s_aux: ``[Hq]`` learned sink logits (gpt-oss).
        packed: the model's mask keeps documents apart, so there must be some.
        sparsetrain_memory: what the layer remembers in place of a cache, from :mod:`sparsetrain.modeling.cache`;
            then ``M == N``.
        kwargs: ``cu_seqlens`` (int32 ``[documents + 1]``; transformers' ``cu_seq_lens_q`` means the same) or else
            ``position_ids`` tell the documents of a packed row apart: a new one starts where the position is not the
            previous one plus one.

    Returns:
        The output ``[B, N, Hq, D]``, and None for the attention weights.

    Raises:
        ModelError: anything asked for that this attention would have to ignore.
    """
    plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE)
    if dropout > 0:
        raise ModelError(
            f"attention dropout of {dropout} is not supported; set the model's attention_dropout (attn_pdrop in GPT-2) "
            "to 0, in a recipe with model.config_overrides"
        )
    if is_causal is False:
        raise ModelError("is_causal=False: only causal attention is supported")
    if output_attentions:
        raise ModelError("output_attentions=True: attention weights are never formed; load the dense model to see them")
    extra_names = plan.method.extra_inputs if plan.method else frozenset()
    extra = {name: kwargs.pop(name) for name in extra_names & kwargs.keys()}
    for name in kwargs.keys() - HARMLESS_ARGUMENTS:
        if kwargs[name] is not None:
            raise ModelError(f"{type(module).__name__} passes {name} to its attention, which no method here honours")
    if value.shape[-1] != key.shape[-1]:
        raise ModelError(f"keys of width {key.shape[-1]} and values of width {value.shape[-1]} are not supported")

    settings: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sink_logits": s_aux,
    }
    attend: Attend
    if plan.method is None:
        attend = partial(causal_attention, window=plan.window, **settings)
    else:
        attend = partial(plan.method.attend, module, **settings)
        if plan.window is not None:
            _check_cache_is_whole(plan, query, key, attention_mask, kwargs.get("position_ids"))

    if sparsetrain_memory is not None:
        attend = partial(sparsetrain_memory.attend, module, **settings, **extra)
        out = _attend_remembering(
            attend, sparsetrain_memory, query, key, value, attention_mask, kwargs, module.training
        )
    elif attention_mask is not None:
        out = _attend_padded(attend, query, key, value, extra, attention_mask, kwargs, training=module.training)
    else:
        out = _attend_packed(attend, query, key, value, extra, kwargs, packed=packed, training=module.training)
    return out.transpose(1, 2).contiguous(), None


def _check_cache_is_whole(
    plan: LayerPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """A replaced sliding layer reads far back, but the cache transformers makes for it forgets what left the window."""
    if query.shape[2] == key.shape[2]:
        return
    if mask is not None:
        seen = mask.shape[1]
    else:
        seen = int(position_ids.max()) + 1 if position_ids is not None else key.shape[2]
    if seen > key.shape[2]:
        raise ModelError(
            f"layer {plan.index} no longer uses its sliding window of {plan.window} tokens, but the cache kept only "
            "that; pass past_key_values=transformers.DynamicCache()"
        )


def _attend_padded(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extra: dict[str, torch.Tensor],
    mask: torch.Tensor,
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> torch.Tensor:
    """Attention of padded rows: each starts at its first real token, so that blocks count from there.

    Padding on the right needs nothing, as no earlier token sees it. Outputs at left padding are zero.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    first, _ = _real_tokens(mask, num_queries, num_keys, kwargs, training=training)
    rows_by_start: dict[int, list[int]] = {}
    for row, start in enumerate(first):
        rows_by_start.setdefault(start, []).append(row)
    out = torch.zeros_like(query)
    for start, rows in rows_by_start.items():
        skipped = max(0, start - (num_keys - num_queries))
        if skipped < num_queries:
            # Extra inputs are of the tokens of this call, as queries are.
            out[rows, :, skipped:] = attend(
                query[rows, :, skipped:],
                key[rows, :, start:],
                value[rows, :, start:],
                cu_seqlens=None,
                q_start=None,
                **{name: tensor[rows, :, skipped:] for name, tensor in extra.items()},
            )
    return out


def _real_tokens(
    mask: torch.Tensor, num_queries: int, num_keys: int, kwargs: dict[str, Any], *, training: bool
) -> tuple[list[int], list[int]]:
    """Index of the first and the last real token of each row among its keys, once it is sure that all between are."""
    if explicit_documents(kwargs) is not None:
        raise ModelError("cu_seqlens is for packed rows without padding; drop the attention mask")
    if mask.shape[1] < num_keys:
        raise ModelError(f"the attention mask covers {mask.shape[1]} tokens, but there are {num_keys} keys")
    mask = mask[:, -num_keys:].int()
    first = mask.argmax(dim=1)
    last = num_keys - 1 - mask.flip(1).argmax(dim=1)
    real = mask.sum(dim=1)
    holey = (real > 0) & (real != last - first + 1)
    if bool(holey.any()):
        row = int(holey.nonzero()[0])
        hole = int(first[row]) + int(mask[row, first[row] :].argmin())
        raise ModelError(
            f"the attention mask has zeros between real tokens (row {row}, at token {hole}), and no key is left out in "
            "the middle of a row; leave such tokens out of the row, keep documents apart by position_ids that restart "
            "or cu_seqlens, and pad on the left or on the right only"
        )
    if training:
        raise ModelError(
            "the batch is padded; pack documents into one row (position_ids that restart, or cu_seqlens) instead"
        )
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        both_real = mask[:, 1:].logical_and(mask[:, :-1])[:, 1 - num_queries :]
        if num_queries > 1 and bool(((position_ids.diff(dim=-1) != 1) & both_real).any()):
            raise ModelError("a padded row holds several documents (its positions restart); pack without padding")
    # A row that is nothing but padding so far starts after it.
    first = torch.where(real > 0, first, num_keys)
    return first.tolist(), torch.where(real > 0, last, num_keys - 1).tolist()


def _attend_remembering(
    attend: Attend,
    memory: Memory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    training: bool,
) -> torch.Tensor:
    """Attention of a layer that remembers the past by itself: the keys are those of this call only."""
    tokens = query.shape[2]
    starts = None
    # In generation, a row that has begun has no more padding: nothing has to be read from the device.
    if mask is not None and not (tokens == 1 and memory.started):
        width = mask.shape[-1]
        first, last = _real_tokens(mask, tokens, width, kwargs, training=training)
        starts = [max(0, start - (width - tokens)) for start in first]
        if min(last) < width - 1:
            raise ModelError(
                "the batch is padded on the right, and what follows would see the padding; pad on the left"
            )
    elif mask is None and tokens > 1:
        explicit = explicit_documents(kwargs)
        documents = [explicit] if explicit is not None else documents_of(kwargs, query, training)
        if documents is not None and any(cu_seqlens.numel() > 2 for cu_seqlens in documents):
            raise ModelError("packed documents cannot share a key/value cache; pass use_cache=False")
    return attend(query, key, value, starts=starts)


def _attend_packed(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extra: dict[str, torch.Tensor],
    kwargs: dict[str, Any],
    *,
    packed: bool,
    training: bool,
) -> torch.Tensor:
    """Attention of rows without padding, each of one document or of several."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    explicit = explicit_documents(kwargs)
    if explicit is not None and batch > 1:
        raise ModelError(f"cu_seqlens describes one packed row, but the batch has {batch}; join the rows into one")
    documents = [explicit] if explicit is not None else documents_of(kwargs, query, training)
    if documents is None:
        if packed:
            raise ModelError(
                "position_ids restart, and the model's mask keeps the documents apart, but its attention is not told "
                "where they end; pass it cu_seqlens"
            )
        return attend(query, key, value, cu_seqlens=None, q_start=None, **extra)

    several = any(cu_seqlens.numel() > 2 for cu_seqlens in documents)
    if num_keys > num_queries or (several and kwargs.get("use_cache")):
        raise ModelError("packed documents cannot share a key/value cache; pass use_cache=False")
    rows = []
    for i, cu_seqlens in enumerate(documents):
        q, k, v = (tensor[i : i + 1] for tensor in (query, key, value))
        own = {name: tensor[i : i + 1] for name, tensor in extra.items()}
        rows.append(attend(q, k, v, cu_seqlens=cu_seqlens, q_start=None, **own))
    return torch.cat(rows)


AttentionInterface.register(ATTENTION_NAME, registered_attention)
AttentionMaskInterface.register(ATTENTION_NAME, mask_of_requests)
