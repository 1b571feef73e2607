"""The attention function transformers calls for every layer of a sparsified model, and its mask function.

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
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import DecodeState, Method
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
    """:func:`attention_forward`, or what ``sparsetrain_ulysses`` makes of it where ranks share the sequence."""
    if sparsetrain_ulysses is None:
        return attention_forward(module, query, key, value, attention_mask, **kwargs)
    plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    extra = plan.method.extra_inputs if plan is not None and plan.method is not None else frozenset()
    return sparsetrain_ulysses(
        attention_forward, module, query, key, value, attention_mask, extra_inputs=extra, **kwargs
    )


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


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    sparsetrain_state: DecodeState | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' ``AttentionInterface`` calls it.

    Args:
        module: the attention module; :func:`~sparsetrain.modeling.sparsify` has left its plan on it.
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]``; with a cache ``M > N``.
        attention_mask: bool ``[B, M]``, False on padding, from :func:`padding_mask`; None without padding.
        scaling: factor on the logits; by default ``D ** -0.5``.
        dropout: must be 0.
        sliding_window: the window of this layer in tokens, in models that have one.
        softcap: soft cap of the logits (Gemma-2).
        s_aux: ``[Hq]`` learned sink logits (gpt-oss).
        sparsetrain_state: what the layer remembers in place of a cache, from :mod:`sparsetrain.modeling.cache`;
            then ``M == N``.
        kwargs: ``cu_seqlens`` (int32 ``[documents + 1]``; transformers' ``cu_seq_lens_q`` means the same) or else
            ``position_ids`` tell the documents of a packed row apart: a new one starts where the position is not the
            previous one plus one.

    Returns:
        The output ``[B, N, Hq, D]``, and None for the attention weights.

    Raises:
        ModelError: anything asked for that this attention would have to ignore.
    """
    plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} has no attention method; call sparsetrain.sparsify(model, ...) first"
        )
    if dropout > 0:
        raise ModelError(
            f"attention dropout of {dropout} is not supported; set the model's attention_dropout (attn_pdrop in GPT-2) "
            "to 0, in a recipe with model.config_overrides"
        )
    if is_causal is False:
        raise ModelError("is_causal=False: only causal attention is supported")
    if output_attentions:
        raise ModelError("output_attentions=True: attention weights are never formed; load the dense model to see them")
    if sliding_window != plan.window:
        raise ModelError(
            f"layer {plan.index} was built with a sliding window of {plan.window} tokens, but {type(module).__name__} "
            f"asks for {sliding_window}; not supported"
        )
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

    if sparsetrain_state is not None and plan.method is not None:
        attend = partial(plan.method.attend_with_state, module, state=sparsetrain_state, **settings, **extra)
        out = _attend_remembering(attend, sparsetrain_state, query, key, value, attention_mask, kwargs, module.training)
    elif attention_mask is not None:
        out = _attend_padded(attend, query, key, value, extra, attention_mask, kwargs, training=module.training)
    else:
        out = _attend_packed(attend, plan, query, key, value, extra, kwargs, training=module.training)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask transformers hands to :func:`attention_forward`: bool ``[B, M]``, or None without padding.

    Causality, windows and documents need no mask here, so those requests are dropped; anything beyond them raises.
    """
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise ModelError(
            "the model adds a mask of its own (bidirectional image or prefix tokens), which is not supported"
        )
    if isinstance(q_offset, torch.Tensor) or kv_offset + kv_length > q_offset + q_length:
        raise ModelError(
            "static caches are not supported; generate with a DynamicCache (cache_implementation='dynamic')"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


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
    if training:
        raise ModelError(
            "the batch is padded; pack documents into one row (position_ids that restart, or cu_seqlens) instead"
        )
    if mask.ndim != 2:
        raise ModelError(
            f"an attention mask with {mask.ndim} dimensions is not supported; pass [batch, tokens] or none"
        )
    if _explicit_documents(kwargs) is not None:
        raise ModelError("cu_seqlens is for packed rows without padding; drop the attention mask")
    if mask.shape[1] < num_keys:
        raise ModelError(f"the attention mask covers {mask.shape[1]} tokens, but there are {num_keys} keys")
    mask = mask[:, -num_keys:].int()
    first = mask.argmax(dim=1)
    last = num_keys - 1 - mask.flip(1).argmax(dim=1)
    real = mask.sum(dim=1)
    if bool(((real > 0) & (real != last - first + 1)).any()):
        raise ModelError("the attention mask has padding between real tokens; pad on the left or on the right only")
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
    state: DecodeState,
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
    if mask is not None and not (tokens == 1 and state.started):
        width = mask.shape[-1]
        first, last = _real_tokens(mask, tokens, width, kwargs, training=training)
        starts = [max(0, start - (width - tokens)) for start in first]
        if min(last) < width - 1:
            raise ModelError(
                "the batch is padded on the right, and what follows would see the padding; pad on the left"
            )
    elif mask is None and tokens > 1:
        explicit = _explicit_documents(kwargs)
        documents = [explicit] if explicit is not None else _documents(kwargs, query, training)
        if documents is not None and any(cu_seqlens.numel() > 2 for cu_seqlens in documents):
            raise ModelError("packed documents cannot share a key/value cache; pass use_cache=False")
    return attend(query, key, value, starts=starts)


def _attend_packed(
    attend: Attend,
    plan: LayerPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extra: dict[str, torch.Tensor],
    kwargs: dict[str, Any],
    *,
    training: bool,
) -> torch.Tensor:
    """Attention of rows without padding, each of one document or of several."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    explicit = _explicit_documents(kwargs)
    if explicit is not None and batch > 1:
        raise ModelError(f"cu_seqlens describes one packed row, but the batch has {batch}; join the rows into one")
    documents = [explicit] if explicit is not None else _documents(kwargs, query, training)
    if documents is None:
        return attend(query, key, value, cu_seqlens=None, q_start=None, **extra)

    several = any(cu_seqlens.numel() > 2 for cu_seqlens in documents)
    if num_keys > num_queries or (several and kwargs.get("use_cache")):
        raise ModelError("packed documents cannot share a key/value cache; pass use_cache=False")
    if several and plan.leaks_between_documents:
        raise ModelError(
            "this model also mixes tokens outside attention (state-space, convolution or linear attention layers), so "
            "packed documents would leak into each other; set sequence.packing: false and train.micro_batch: 1"
        )
    rows = []
    for i, cu_seqlens in enumerate(documents):
        q, k, v = (tensor[i : i + 1] for tensor in (query, key, value))
        own = {name: tensor[i : i + 1] for name, tensor in extra.items()}
        rows.append(attend(q, k, v, cu_seqlens=cu_seqlens, q_start=None, **own))
    return torch.cat(rows)


def _explicit_documents(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """``cu_seqlens`` as the caller gave it, under our name or transformers' own."""
    given = kwargs.get("cu_seqlens")
    if given is None and kwargs.get("cu_seq_lens_q") is not None:
        given = kwargs["cu_seq_lens_q"].int()
    return given


def _documents(kwargs: dict[str, Any], query: torch.Tensor, training: bool) -> list[torch.Tensor] | None:
    """``cu_seqlens`` of each row, from where its positions restart; None if every row is one document."""
    batch, num_queries = query.shape[0], query.shape[2]
    position_ids = kwargs.get("position_ids")
    # Models with three-dimensional positions (Qwen2.5-VL) pass None for the text's own; elsewhere that is no answer.
    if num_queries == 1 or (position_ids is None and "position_ids" in kwargs and not training):
        return None
    if position_ids is None or position_ids.ndim != 2:
        given = "no position_ids" if position_ids is None else f"position_ids of shape {list(position_ids.shape)}"
        raise ModelError(f"this model hands its attention {given}, which tells no documents apart; pass it cu_seqlens")
    return _bounds(position_ids, batch)


_KNOWN_BOUNDS = WeakIdKeyDictionary()
"""What :func:`_bounds` found in the positions of the passes in flight."""


def _bounds(position_ids: torch.Tensor, batch: int) -> list[torch.Tensor] | None:
    """``cu_seqlens`` of each row. Every layer of a pass asks with the same tensor, and each answer stops the device."""
    state = None if position_ids.is_inference() else (position_ids._version, batch)
    known, found = _KNOWN_BOUNDS.get(position_ids, (None, None))
    if state is None or state != known:
        restarts = (position_ids.diff(dim=1) != 1).expand(batch, -1)
        found = None
        if bool(restarts.any()):
            ends = torch.ones_like(restarts[:, :1])
            rows = zip(restarts, ends, strict=True)
            found = [torch.cat([end, row, end]).nonzero().flatten().int() for row, end in rows]
        _KNOWN_BOUNDS[position_ids] = state, found
    return found


AttentionInterface.register(ATTENTION_NAME, registered_attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
