"""Attention over a SparseK selection under the full mask, the definition of the operation, in plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.selected_keys.inputs import SelectedInputs


def dense_attention(inputs: SelectedInputs) -> tuple[Tensor, Tensor]:
    """Builds every logit and every gate; ``out [B, Hq, N, D]`` and ``lse [B, Hq, N]``, the log of the denominator.

    Matrix products run in the inputs' dtype and the softmax in fp32 (fp64 for fp64 inputs), as eager models do.
    """
    query, key, value = inputs[:3]
    visible, gates = visible_keys(inputs), key_gates(inputs)
    grouped = query.unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key.unsqueeze(2).mT).to(gates.dtype) * inputs.scale
    if inputs.gate == "log":
        logits = logits + gates.log()
    elif inputs.gate == "straight":
        # Zero with the slope of the log gate at 1: the forward pass knows no gate.
        logits = logits + (gates - gates.detach())
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    if inputs.gate == "value":
        weights = weights * gates
    out = weights.to(value.dtype) @ value.unsqueeze(2)
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def visible_keys(inputs: SelectedInputs) -> Tensor:
    """The mask, bool ``[B, Hs, 1, N, N]``: same document, not later, and in the window or selected, as sinks are."""
    rows = torch.arange(inputs.query.shape[2], device=inputs.query.device)
    row, key = rows[:, None], rows
    causal = (key <= row) & (key >= document_starts(inputs)[:, None])
    selected = row < inputs.exit[:, :, None]
    return (causal & ((row - key < inputs.window) | selected)).unsqueeze(2)


def key_gates(inputs: SelectedInputs) -> Tensor:
    """``p_ij = clip(u_j - tau_i, 0, 1)`` for keys that compete, 1 for sinks and the window, ``[B, Hs, 1, N, N]``.

    The derivative lies strictly inside: at 0 and 1 there is none, and none where the threshold is ``-inf``.
    """
    rows = torch.arange(inputs.query.shape[2], device=inputs.query.device)
    always = (rows[:, None] - rows < inputs.window) | (rows - document_starts(inputs) < inputs.sinks)
    gates = inputs.scores[:, :, None] - inputs.threshold[:, :, :, None]
    inside = (gates > 0) & (gates < 1) & ~always
    return torch.where(inside, gates, (always | (gates >= 1)).to(gates.dtype)).unsqueeze(2)


def document_starts(inputs: SelectedInputs) -> Tensor:
    """``[N]`` the row at which the document of each row starts."""
    rows = inputs.query.shape[2]
    starts = torch.zeros(rows, dtype=torch.int64)
    for row, length, *_ in inputs.documents():
        starts[row : row + length] = row
    return starts.to(inputs.query.device)
