"""Attention over lists of keys under the full mask, the definition of the operation, in plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.listed_keys.inputs import ListedInputs


def dense_attention(inputs: ListedInputs) -> tuple[Tensor, Tensor]:
    """Builds every logit; ``out [B, Hq, N, D]`` and ``lse [B, Hq, N]``, 0 and -inf of rows that see nothing.

    Matrix products run in the inputs' dtype and the softmax in fp32 (fp64 for fp64 inputs), as eager models do.
    """
    query, key, value = inputs[:3]
    visible = visible_keys(inputs).unsqueeze(2)
    computed = visible.any(-1, keepdim=True)
    logits = query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).mT
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * inputs.scale
    # Rows that see nothing stay finite until the end, and so do their gradients.
    logits = logits.masked_fill(~visible & computed, float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    weights = torch.exp(logits - lse).masked_fill(~computed, 0)
    out = weights.to(value.dtype) @ value.unsqueeze(2)
    lse = lse.masked_fill(~computed, float("-inf"))
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def visible_keys(inputs: ListedInputs) -> Tensor:
    """The mask, bool ``[B, Hkv, N, N]``, segment by segment."""
    batch, heads, tokens = inputs.key.shape[:3]
    lists, counts = inputs.lists.cpu(), inputs.counts.cpu()
    visible = torch.zeros((batch, heads, tokens, tokens), dtype=torch.bool)
    for number, first, end, document in (segment for segments in inputs.segments() for segment in segments):
        near = max(document, first - inputs.window)
        own = torch.ones((end - first, end - near), dtype=torch.bool).tril(first - near)
        visible[:, :, first:end, near:end] = own
        visible[:, :, first:end, document : min(document + inputs.sinks, near)] = True
        for b in range(batch):
            for h in range(heads):
                entries = lists[b, h, number, : int(counts[b, h, number])].long()
                keys = (entries[:, None] * inputs.granule + torch.arange(inputs.granule)).flatten() + document
                visible[b, h, first:end, keys[(keys >= document) & (keys < near)]] = True
    return visible.to(inputs.query.device)
