"""The choice in plain PyTorch: some rows of a document at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.gather import CHUNK_ELEMENTS
from sparsetrain_kernels.key_choice.chunks import lists_of
from sparsetrain_kernels.key_choice.inputs import ChoiceInputs, whole_lists

LEAST = torch.finfo(torch.float16).min


def choose(inputs: ChoiceInputs) -> tuple[Tensor, Tensor, Tensor]:
    """``lists [B, Hkv, P, capacity]``, ``counts`` and ``dropped [B, Hkv, P]``, int32."""
    found = whole_lists(inputs)
    batch, heads = inputs.query.shape[:2]
    for start, first, places in inputs.rows().by_document():
        step = max(1, CHUNK_ELEMENTS // (batch * heads * (places[-1] + 1 - start)))
        for begin in range(0, len(places), step):
            own = places[begin : begin + step]
            rows = slice(first + begin, first + begin + len(own))
            weights = _weights(inputs, rows, slice(start, own[-1] + 1))
            lengths = torch.tensor(own, dtype=torch.int32, device=weights.device) + 1 - start
            later = torch.arange(weights.shape[2], device=weights.device) >= lengths[:, None]
            weights.unflatten(0, (batch, -1)).masked_fill_(later[:, None], float("-inf"))
            for whole, part in zip(found, lists_of(inputs, weights, lengths.repeat(batch), "reference"), strict=True):
                whole[:, :, rows] = part.unflatten(0, (batch, -1)).transpose(1, 2)
    return found


def _weights(inputs: ChoiceInputs, rows: slice, keys: slice) -> Tensor:
    """Logarithms of weights, fp16 ``[B * rows, row_heads, keys]``."""
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    query = inputs.query[:, :, rows].to(dtype).unflatten(1, (inputs.key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ inputs.key[:, :, None, keys].to(dtype).mT * inputs.scale
    weights = logits.float() - inputs.lse[:, :, rows, None].unflatten(1, (inputs.key.shape[1], -1))
    weights = weights.amax(2) if inputs.p == 0 else weights.flatten(1, 2)
    return weights.clamp(min=LEAST).half().transpose(1, 2).flatten(0, 1).contiguous()
