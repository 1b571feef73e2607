"""The costs of a recycled layer for ``sparsetrain plan``."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.methods.costs import NO_PARAMETERS, AttentionCosts, AttentionRate, LayerShape

RATE = AttentionRate(forward=(150e12, 110e12), backward=(110e12, 85e12))
"""An estimate, with the choice: no measurement yet."""

BYTES = 64.0
"""Bytes per token and query head in backward besides the lists; an estimate."""


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
    lists = 4.0 * shape.kv_heads * (min(keep, shape.length) + 2) / min(lengths)
    return AttentionCosts(
        rate=RATE,
        backward_bytes=BYTES * shape.heads,
        saved_bytes=lists,
        keeps_input=False,
        parameters=NO_PARAMETERS,
        note="Time and memory are for plain text; every token of a prompt attends fully.",
    )
