"""SPARSEK of every causal prefix: checks the arguments and calls the operation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.causal_selection.axis import MAX_TOKENS
from sparsetrain_kernels.causal_selection.library import CausalSparsek
from sparsetrain_kernels.causal_selection.selection import CausalSelection
from sparsetrain_kernels.eager import apply

TRITON_TOKENS = 2**24
"""Tokens of all heads together: the kernels' axis is twice as fine."""


def causal_sparsek(
    scores: Tensor,
    topk: int,
    window: int,
    *,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> CausalSelection:
    """The ``topk`` best keys and the SPARSEK threshold of every row, as intervals of rows (2406.16747, section 3.2).

    Row i of a document always sees its first ``sinks`` tokens and the last ``window`` ones, itself included. All other
    earlier tokens are its candidates: a token starts to compete in the row in which the window leaves it behind. The
    ``topk`` candidates with the largest scores are selected; of equal scores, newer tokens win. The gate of a candidate
    is ``clip(scores_j - threshold_i, 0, 1)``, and these gates add up to ``topk``.

    Exact, the same bit for bit on every run, and independent of later tokens, of other heads and of other documents:
    differences of scores are rounded once to multiples of ``2 ** -36``, and sums are of integers. Time grows as
    ``L log L`` for ``L = B * H * N`` tokens, memory as about 270 bytes a token while it runs and 24 afterwards. Nothing
    is read on the host.

    The threshold is rounded to the dtype of the scores. In fp32, the gates of a row with scores around 10,000 add up to
    ``topk`` to a hundredth only; normalised scores stay near zero, where it is a millionth.

    Scores are finite. Infinite and NaN ones do not disturb other documents: ``inf`` and NaN win over all others and
    ``-inf`` loses, but where they are needed for the sum, the threshold and with it the row's gates are not finite.

    Args:
        scores: fp32 or fp64 ``[B, H, N]``, in any layout. Under autocast too: rounded to bf16, scores that grow along
            a long text have far fewer values than there are tokens.
        topk: selected keys a row, at least 1.
        window: at least 1.
        sinks: tokens at the start of each document that do not compete.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents. Needs ``B == 1``. Must rise from 0 to
            ``N``; on a device, it is not read to check.
        backend: ``triton``, ``reference`` (plain PyTorch), or ``auto``: the first on CUDA where it can run. Both give
            the same integers and thresholds, bit for bit.

    Returns:
        A :class:`CausalSelection` of tensors ``[B, H, N]``. Its threshold is differentiable:
        ``d threshold_i / d scores_j`` is ``1 / interior_size_i`` for the keys of the interior, and 0 for the others.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    _check(scores, topk, window, sinks, cu_seqlens)
    too_many = f"its axis holds up to {TRITON_TOKENS} tokens, not {scores.numel()}"
    refusals = {
        "gluon": "there is no Hopper version",
        "triton": too_many if scores.numel() > TRITON_TOKENS else None,
    }
    chosen = choose_backend(backend, scores, refusals)
    needs_grad = torch.is_grad_enabled() and scores.requires_grad
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    args = (scores, topk, window, sinks, cu_seqlens, chosen)
    return CausalSelection(
        *(apply(CausalSparsek, *args) if needs_grad else torch.ops.sparsetrain.causal_sparsek(*args))
    )


def _check(scores: Tensor, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None) -> None:
    check_tensors(scores=scores)
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"scores are {scores.dtype}, expected float32 or float64: lower precisions round different tokens to the "
            "same score; compute them outside of autocast"
        )
    if scores.dim() != 3 or 0 in scores.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected [batch, heads, tokens], none of them 0")
    if scores.numel() > MAX_TOKENS:
        raise ValueError(
            f"scores hold {scores.numel()} tokens of all heads and sequences, at most {MAX_TOKENS} fit; split the heads"
        )
    for name, value, least in (("topk", topk, 1), ("window", window, 1), ("sinks", sinks, 0)):
        check_count(name, value, least)
    if cu_seqlens is None:
        return
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise TypeError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected int32 [documents + 1] with "
            "at least two bounds"
        )
    if scores.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1, scores have batch {scores.shape[0]}")
