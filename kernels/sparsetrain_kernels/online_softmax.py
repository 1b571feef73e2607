"""What Triton kernels that walk keys tile by tile have in common: powers of two, and steps of the online softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """By ``exp2``, which is everywhere, unlike libdevice's. Saturates through inf and 0."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def accumulate(logits, value, peak, total, acc, to_log2, PRECISION: tl.constexpr):
    """As :func:`accumulate_gated`, without gates, for rows of which each has seen a key by the end of this tile."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits * to_log2 - (new_peak * to_log2)[:, None])
    rescale = tl.exp2((peak - new_peak) * to_log2)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax over a tile of keys, for rows that may have seen nothing yet.

    Args:
        logits: raw products ``[rows, keys]``, -inf where a row does not see a key; ``to_log2`` makes them powers of 2.
        gates: factors of the weights, with ``GATE="straight"`` none, with ``"value"`` in the output alone, with
            ``"log"`` in the denominator too.
        peak, total, acc: of the tiles before: the largest logit of each row (raw), the denominator, and the output.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # A row that has seen nothing yet keeps weights of zero.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits * to_log2 - (base * to_log2)[:, None])
    rescale = tl.exp2((peak - base) * to_log2)
    if GATE == "log":
        weights = weights * gates
        total = total * rescale + tl.sum(weights, 1)
    else:
        total = total * rescale + tl.sum(weights, 1)
        if GATE == "value":
            weights = weights * gates
    acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return new_peak, total, acc
