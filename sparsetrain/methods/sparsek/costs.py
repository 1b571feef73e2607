"""The costs of a SparseK layer for ``sparsetrain plan``.

Rates and bytes were measured on one H200 in bf16, 2026-11-24, by the commands in docs/performance.md.
"""

from __future__ import annotations

from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape, NewParameters

RATE = AttentionRate(forward=(210e12, 158e12), backward=(228e12, 209e12))
"""With selection, at 131,072 tokens, head dim 128. Head dim 64 was not measured; it is scaled as block patterns."""

BYTES = (422.0, 126.0)
"""Bytes per token and query head of dim 128: 422 MiB for 32,768 tokens of 32 heads. Beyond that, memory is constant
until 126 bytes per token exceed it: 528 MiB for 131,072 tokens, 2,115 MiB for 524,288."""

KNEE = 32768
"""Tokens up to which the memory grows at the first of those rates."""

SELECTION_BYTES = 24.0
"""Bytes of a selection per token and KV head."""


def layer_costs(shape: LayerShape, *, scores: int, learned: bool, normalize: bool, note: str | None) -> AttentionCosts:
    """The costs of one layer.

    Args:
        scores: Scores per token.
        learned: Whether the scorer is trained.
        normalize: Whether the scorer has gains.
    """
    growing, lasting = BYTES
    per_head = max(min(growing, growing * KNEE / shape.length), lasting) * shape.head_dim / 128
    trained = NewParameters(scores * shape.hidden, scores if normalize else 0, shape.kv_heads * shape.hidden)
    return AttentionCosts(
        rate=RATE,
        backward_bytes=per_head * shape.heads,
        saved_bytes=SELECTION_BYTES * shape.kv_heads,
        keeps_input=True,
        parameters=trained if learned else NO_PARAMETERS,
        note=note,
    )
