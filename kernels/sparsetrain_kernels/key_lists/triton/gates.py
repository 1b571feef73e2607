"""The gates of selected keys in Triton kernels, and the gradients that pass through them."""

import triton
import triton.language as tl


@triton.jit
def gate(score, threshold):
    """``clip(score - threshold, 0, 1)``. A sink's score is inf, a threshold with room for all is -inf: both give 1."""
    return tl.minimum(tl.maximum(score - threshold, 0.0), 1.0)


@triton.jit
def gates_of_block(scores_ptr, index, is_listed, threshold):
    """The gates ``[rows, keys]`` of a block of keys; those of neighbours are 1."""
    score = tl.where(is_listed, tl.load(scores_ptr + index), float("inf"))
    return gate(score[None, :], threshold[:, None])


@triton.jit
def grad_pairs(weights, gates, grad_weights, delta, GATE: tl.constexpr):
    """The gradients of logits and gates; of the gates, where they lie strictly between 0 and 1. ``weights`` are without
    the gates."""
    interior = (gates > 0.0) & (gates < 1.0)
    if GATE == "value":
        per_gate = weights * grad_weights
        grad_logits = gates * per_gate - weights * delta
    else:
        per_gate = weights * (grad_weights - delta)
        grad_logits = per_gate
        if GATE == "log":
            grad_logits = per_gate * gates
    return grad_logits, tl.where(interior, per_gate, 0.0)
