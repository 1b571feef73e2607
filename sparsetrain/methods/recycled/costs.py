"""The costs of a recycled layer for ``sparsetrain plan``.

Rates and bytes were measured on one H200 in bf16, 2026-11-30, by ``python kernels/benchmarks/recycled_attention.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape

RATE = AttentionRate(forward=(211e12, 159e12), backward=(268e12, 203e12))
"""With the choice; the mean of 185 and 238 in forward and of 235 and 301 TFLOP/s in backward at 32,768 tokens
(segments of 16, 1,024 keys) and at 131,072 (segments of 32, 2,048 keys). Head dim 64 was not measured; it is scaled as
block patterns."""

BYTES = (2304.0, 719.0)
"""Bytes per token and query head of dim 128, with what the choice takes: 2.25 GiB for 32,768 tokens of 32 heads. Beyond
that, memory is constant until 719 bytes per token exceed it: 2.81 GiB for 131,072 tokens."""

KNEE = 32768
"""Tokens up to which the memory grows at the first of those rates."""


def share_of_pairs(length: int, every: int, reused: int) -> float:
    """The fraction of the causal pairs of a text of ``length`` tokens that is attended without a prompt: about
    ``1/S + 2K/n + S/n``.

    Args:
        every: S, tokens between two choices.
        reused: K, keys that a token reads at most besides those since the choice.
    """
    starts = range(0, length, every)
    chosen = len(starts)
    full = sum(starts) + chosen
    pairs = full
    for start in starts:
        rows = min(every, length - start) - 1
        pairs += rows * min(reused, start + 1) + rows * (rows + 1) // 2
    return pairs / (length * (length + 1) // 2)


def layer_costs(shape: LayerShape, *, lengths: Sequence[int], keep: int) -> AttentionCosts:
    """The costs of one layer.

    Args:
        lengths: The lengths of segments that are drawn from; the shortest has the most lists.
        keep: Keys of a list.
    """
    growing, lasting = BYTES
    per_head = max(min(growing, growing * KNEE / shape.length), lasting) * shape.head_dim / 128
    lists = 4.0 * shape.kv_heads * (min(keep, shape.length) + 2) / min(lengths)
    return AttentionCosts(
        rate=RATE,
        backward_bytes=per_head * shape.heads,
        saved_bytes=lists,
        keeps_input=False,
        parameters=NO_PARAMETERS,
        note="Time and memory are for plain text; every token of a prompt attends fully.",
    )
