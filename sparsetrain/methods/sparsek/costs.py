"""What ``sparsetrain plan`` counts of a SparseK layer.

Rates and bytes were measured on one H200 in bf16, 2026-11-24, by the commands in docs/performance.md.
"""

from __future__ import annotations

from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape, NewParameters

RATE = AttentionRate(forward=(210e12, 158e12), backward=(228e12, 209e12))
"""Selection included, at 131,072 tokens, heads of 128. Heads of 64 were not measured: scaled as block patterns."""

BYTES = (422.0, 126.0)
"""Bytes for each token and query head of 128: 422 MiB for 32,768 tokens of 32 heads. From there on the memory stays
until 126 bytes a token are more: 528 MiB for 131,072 tokens, 2,115 MiB for 524,288."""

KNEE = 32768
"""Tokens up to which the memory grows at the first of those rates."""

SELECTION_BYTES = 24.0
"""Bytes for each token and KV head of a selection."""


def layer_costs(shape: LayerShape, *, scores: int, learned: bool, normalize: bool, note: str | None) -> AttentionCosts:
    """The costs of one layer.

    Args:
        scores: scores a token.
        learned: its scorer is trained.
        normalize: the scorer has gains.
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
