"""The request that a model makes by its mask, read without building the mask.

transformers describes a mask as a function of two positions, put together from a few known pieces (causal, a sliding
window, chunks, packed documents), and hands it to the mask function of the attention in use. A layer may be told of its
window there and nowhere else. So ours takes the function apart and sends what it finds to the layers, on the tensor
that goes where the mask would; a piece that it does not know is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import masking_utils

from sparsetrain.errors import ModelError

STATIC = (
    "the static caches of transformers are not supported; pass past_key_values=sparsetrain.SparseCache(model, "
    "max_length=...), or generate without cache_implementation"
)

REQUEST_ATTRIBUTE = "sparsetrain_request"
"""Attribute of the tensor handed to the layers, which holds its :class:`MaskRequest`."""


@dataclass(frozen=True)
class MaskRequest:
    """The content of a layer's mask, except causality and padding."""

    window: int | None = None
    """Sliding window in tokens, the token's own included."""
    packed: bool = False
    """Rows hold several documents, which are to be kept apart."""
    padded: bool = False
    """Some token of the batch may be padding, as the tensor that carries this says."""
    fault: str | None = None
    """Why no layer here can attend so."""


def mask_of_requests(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask that transformers hands to the attention of each layer: bool ``[B, 1, 1, M]``, True on real tokens.

    The request is an attribute of it. The layer refuses a request that it cannot honour; not every mask that a model
    makes is used.

    Raises:
        ModelError: the keys are those of a static cache of transformers.
    """
    request = _read(mask_function)
    if attention_mask is not None and attention_mask.ndim != 2:
        request, attention_mask = MaskRequest(fault=_not_over_tokens(attention_mask)), None
    # Static caches tell their length by a tensor.
    static = isinstance(q_offset, torch.Tensor)
    if not static and kv_offset + kv_length > q_offset + q_length:
        raise ModelError(STATIC)
    # In a step nothing waits for the device.
    step = q_length == 1 and attention_mask is not None and (static or attention_mask.is_cuda)
    padded = attention_mask is not None and (step or not bool(attention_mask.all()))
    if isinstance(q_offset, torch.Tensor) and attention_mask is not None and step:
        place = q_offset.reshape(1).clamp_max(attention_mask.shape[1] - 1)
        carrier = attention_mask.index_select(1, place.to(attention_mask.device)).bool()[:, None, None].contiguous()
    elif attention_mask is not None and padded:
        carrier = attention_mask[:, None, None].contiguous()
    elif static:
        # Of one shape in every step, and contiguous: generate makes it so, and would lose what is set on it.
        carrier = torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device)
    else:
        carrier = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(batch_size, 1, 1, kv_length)
    if padded or (static and q_length == 1):
        # A step with a static cache, with or without a mask, so that all steps are the same.
        request = replace(request, padded=True)
    setattr(carrier, REQUEST_ATTRIBUTE, request)
    return carrier


def received(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, MaskRequest | None]:
    """The padding of a call, bool ``[B, M]`` or None, and what the model asks for; None if nobody says.

    Raises:
        ModelError: the mask is not one over tokens.
    """
    if mask is None:
        return None, None
    request: MaskRequest | None = getattr(mask, REQUEST_ATTRIBUTE, None)
    if request is not None:
        if request.fault is not None:
            raise ModelError(request.fault)
        return (mask[:, 0, 0] if request.padded else None), request
    if mask.ndim != 2:
        raise ModelError(_not_over_tokens(mask))
    return (None if bool(mask.all()) else mask), None


def _not_over_tokens(mask: torch.Tensor) -> str:
    return (
        f"an attention mask of shape {list(mask.shape)} ({mask.ndim} dimensions, of queries by keys) reaches the "
        "attention, which reads none: pass [batch, tokens] with zeros on padding, and tell packed documents apart by "
        "position_ids that restart, or by cu_seqlens; what else such a mask says (prefixes, trees, windows of its own) "
        "is not supported"
    )


def _read(function: Callable[..., Any]) -> MaskRequest:
    """Take a mask function apart; every piece of an intersection must be one that is honoured elsewhere."""
    request = MaskRequest()
    causal = False
    for piece in _pieces(function):
        name, held = _name(piece), _held(piece)
        if piece is masking_utils.causal_mask_function:
            causal = True
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            request = replace(request, window=int(held["sliding_window"]))
        elif name == "packed_sequence_mask_function.<locals>.inner_mask":
            request = replace(request, packed=True)
        else:
            return MaskRequest(fault=_refusal(piece))
    return request if causal else MaskRequest(fault=_refusal(masking_utils.bidirectional_mask_function))


def _pieces(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that a mask is the intersection of."""
    held, name = _held(function), _name(function)
    if name == "and_masks.<locals>.and_mask":
        return [piece for each in held["mask_functions"] for piece in _pieces(each)]
    # The same mask by positions in a document, and by positions beyond an offset.
    if name in (
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
        "add_offsets_to_mask_function.<locals>.inner_mask",
    ):
        return _pieces(held["mask_function"])
    return [function]


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _held(function: Any) -> dict[str, Any]:
    """The variables of a function's closure, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return (
        dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if cells else {}
    )


REASONS = {
    "chunked_overlay": "attention within chunks of tokens (attention_chunk_size)",
    "or_masks": "a mask of its own beside the causal one (bidirectional image or prefix tokens)",
    "blockwise_overlay": "blocks of tokens that see each other in both directions",
    "bidirectional_mask_function": "attention in both directions",
    "sliding_window_bidirectional_overlay": "attention in both directions",
}


def _refusal(piece: Any) -> str:
    asked = REASONS.get(_name(piece).partition(".")[0], f"a mask of its own ({_name(piece)})")
    return (
        f"the model asks for {asked}, which is not supported: only causal attention, in sliding windows or not, can be "
        "replaced"
    )
