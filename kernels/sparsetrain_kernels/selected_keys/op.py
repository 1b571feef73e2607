"""The public operations: check the arguments and choose the implementation."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend, gluon_refusal, triton_refusal
from sparsetrain_kernels.causal_selection import causal_sparsek
from sparsetrain_kernels.eager import apply
from sparsetrain_kernels.selected_keys import reference
from sparsetrain_kernels.selected_keys.inputs import SelectedOptions, check_selected_inputs
from sparsetrain_kernels.selected_keys.library import SelectedAttention


@overload
def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    threshold: Tensor,
    exit: Tensor,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[SelectedOptions],
) -> Tensor: ...


@overload
def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    threshold: Tensor,
    exit: Tensor,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
    **options: Unpack[SelectedOptions],
) -> tuple[Tensor, Tensor]: ...


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    threshold: Tensor,
    exit: Tensor,
    *,
    window: int,
    sinks: int = 0,
    topk: int,
    gate: str = "value",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over the first tokens, a window, and tokens selected before (SparseK: 2406.16747, section 3).

    Row ``i`` sees, of its own document, the first ``sinks`` tokens, the last ``window`` tokens, itself included, and
    each key ``j`` with ``j + window <= i < exit_j``. A selected key carries the gate
    ``g_ij = clip(scores_j - threshold_i, 0, 1)``; sinks and the window carry 1. With ``s`` the scaled logits, ``a`` the
    weights of the softmax over the keys seen, ``do`` the gradient of the output and ``D_i = do_i . o_i``:

    - ``"value"``, the paper's (its soft selection in the values only): ``o_i = sum a_ij g_ij v_j``. Gates below 1
      shrink the output. ``ds_ij = a_ij (g_ij do_i.v_j - D_i)`` and ``dg_ij = a_ij do_i.v_j``.
    - ``"log"``: ``a_ij`` is proportional to ``g_ij exp(s_ij)`` and ``o_i = sum a_ij v_j``, so that the weights add up
      to 1. ``ds_ij = a_ij (do_i.v_j - D_i)`` and ``dg_ij = exp(s_ij - lse_i) (do_i.v_j - D_i)``.
    - ``"straight"``: the output knows no gate, all seen keys count fully. ``ds_ij = a_ij (do_i.v_j - D_i)``, and
      ``dg_ij = a_ij (do_i.v_j - D_i)`` is the log gate's derivative at 1, straight through the hard selection.

    Gates strictly between 0 and 1 pass ``dg_ij`` on to ``scores_j`` and, negated, to ``threshold_i``; the others and
    the selection itself pass none. The gradient of ``scores`` is this direct part: what they do to the threshold is the
    part of whatever computed that, such as :func:`~sparsetrain_kernels.causal_sparsek`.

    Logits, gates, softmax and accumulation are fp32 (fp64 for fp64 inputs). Memory grows linearly with the length;
    gradients are the same bit for bit on every run.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, N, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        scores: fp32 ``[B, Hkv, N]``, one a key, or ``[B, 1, N]``, one selection for all heads (fp64 with fp64 queries).
        threshold: ``[B, Hkv, N]`` or ``[B, 1, N]`` like ``scores``, one a row; ``-inf`` where all gates are 1.
        exit: int32 ``[B, Hkv, N]`` or ``[B, 1, N]`` like ``scores``, the row at which each key leaves the selection: at
            most the end of its document, which is the exit of sinks, and at most ``j + window`` for a key never
            selected. Counts rows of the tensors, in packed documents too.
        window: the last tokens that a row sees whatever their score.
        sinks: the first tokens of a document, likewise.
        topk: the most selected keys that any row has, as the ``exit`` say; FLOP counters and buffers are sized by it.
        gate: what a selected key's gate does, as above.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other. Needs
            ``B == 1``. Must rise from 0 to ``N``; Triton does not read it on the host to check.
        scale: factor on the logits; None means ``D ** -0.5``.
        return_lse: also return the log of the softmax denominator. It has no gradient.
        backend: ``gluon`` (Hopper: fp16 and bf16, head dim 64 or 128), ``triton`` (fp32, fp16 and bf16, head dim up to
            256), ``reference`` (plain PyTorch, which reads sizes on the host), or ``auto``: on CUDA the first of them
            that can run the call, else the last.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    inputs = check_selected_inputs(
        query,
        key,
        value,
        scores,
        threshold,
        exit,
        window=window,
        sinks=sinks,
        topk=topk,
        gate=gate,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
    refusals = {"triton": triton_refusal(inputs.query), "gluon": gluon_refusal(inputs.query)}
    chosen = choose_backend(backend, inputs.query, refusals)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:5])
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    args = (*inputs, chosen)
    out, lse = apply(SelectedAttention, *args) if needs_grad else SelectedAttention.forward(*args)
    return (out, lse) if return_lse else out


def sparsek_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    topk: int,
    window: int,
    sinks: int = 0,
    *,
    gate: str = "value",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """SparseK attention (2406.16747, section 3): a window, and the ``topk`` older tokens with the largest scores.

    :func:`~sparsetrain_kernels.causal_sparsek` selects and :func:`selected_attention` attends. A token competes from
    the row on at which it has left the window, and of equal scores the newer token's wins. Rows read at most
    ``sinks + topk + window`` keys, whatever the length. Differentiable in query, key, value and scores, in the latter
    through gates and threshold.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, N, D]``.
        scores: fp32 ``[B, Hkv, N]``, the importance of each key whatever the query, or ``[B, 1, N]``, one selection for
            all heads (fp64 with fp64 queries).
        topk: the tokens selected for a row, and the sum of the gates in SparseK's projection.
        window: the last tokens, always seen, itself included.
        sinks: the first tokens of a document, always seen.
        gate: ``"value"``, ``"log"`` or ``"straight"``, as in :func:`selected_attention`.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other.
        scale: factor on the logits; None means ``D ** -0.5``.
        backend: as in :func:`selected_attention`, for the selection too.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    # Gluon has kernels of attention alone.
    select = "triton" if backend == "gluon" else backend
    selection = causal_sparsek(scores, topk, window, sinks=sinks, cu_seqlens=cu_seqlens, backend=select)
    return selected_attention(
        query,
        key,
        value,
        scores,
        selection.threshold,
        selection.exit,
        window=window,
        sinks=sinks,
        topk=topk,
        gate=gate,
        cu_seqlens=cu_seqlens,
        scale=scale,
        backend=backend,
    )


def selected_attention_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    threshold: Tensor,
    exit: Tensor,
    **options: Unpack[SelectedOptions],
) -> tuple[Tensor, Tensor]:
    """The oracle of :func:`selected_attention` (2406.16747, section 3): builds the whole ``N x N`` mask and all gates.

    Plain autograd; matrix products run in the inputs' dtype. Here the log-sum-exp is differentiable too.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, N, D]``.
        scores, threshold: ``[B, Hkv, N]`` or ``[B, 1, N]``, fp32 (fp64 with fp64 queries).
        exit: int32 ``[B, Hkv, N]`` or ``[B, 1, N]``.
        options: ``window``, ``topk``, ``sinks``, ``gate``, ``cu_seqlens`` and ``scale`` of :func:`selected_attention`.

    Returns:
        ``out [B, Hq, N, D]`` in the query's dtype and ``lse [B, Hq, N]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    return reference.dense_attention(check_selected_inputs(query, key, value, scores, threshold, exit, **options))
