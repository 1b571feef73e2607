"""Attention under an explicit mask, the oracle: every logit is built, in plain autograd, to be obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys where ``visible`` is true.

    Matrix products run in the inputs' dtype and the softmax in fp32 (fp64 for fp64 inputs), as eager models do, so the
    same function is the oracle in fp64 and the yardstick for rounding in bf16.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        visible: bool, ``[N, M]`` or ``[Hkv, N, M]``; every row sees at least one key.
        scale: factor on the logits.
        softcap: ``softcap * tanh(logits / softcap)`` before the mask.
        sink_logits: ``[Hq]``, one more logit a row that takes part in the denominator only.

    Returns:
        ``out [B, Hq, N, D]`` in the query's dtype and ``lse [B, Hq, N]``, the log of the softmax denominator (the sink
        included) in fp32 or fp64.
    """
    batch, query_heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, rows, head_dim)
    logits = grouped @ key.unsqueeze(2).transpose(-1, -2)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = visible.unsqueeze(-3) if visible.dim() == 3 else visible
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(lse.dtype).view(kv_heads, -1, 1))
    out = torch.exp(logits - lse.unsqueeze(-1)).to(value.dtype) @ value.unsqueeze(2)
    return out.reshape(query.shape), lse.reshape(batch, query_heads, rows)
