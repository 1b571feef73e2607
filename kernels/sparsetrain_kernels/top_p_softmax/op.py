"""The public operation: checks its arguments."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_number
from sparsetrain_kernels.inputs import check_inputs
from sparsetrain_kernels.top_p_softmax.reference import Choice, TopPAttention


class TopPOptions(TypedDict, total=False):
    """The optional arguments; ``top_p_attention`` describes them."""

    sinks: int
    window: int
    union: bool
    cu_seqlens: Tensor | None
    q_start: int | None
    scale: float | None


@overload
def top_p_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: float,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[TopPOptions],
) -> Tensor: ...


@overload
def top_p_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: float,
    *,
    return_lse: Literal[True],
    **options: Unpack[TopPOptions],
) -> tuple[Tensor, Tensor]: ...


def top_p_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    p: float,
    *,
    sinks: int = 0,
    window: int = 0,
    union: bool = False,
    cu_seqlens: Tensor | None = None,
    q_start: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row over the fewest earlier keys that hold a share ``p`` of its weight, with gradients (top-p:
    2502.02770, Algorithm 1). An experiment: to train a model as it reads under Twilight.

    Of the keys up to its own a row reads the first ``sinks`` and the last ``window`` ones of its document, and of the
    others the fewest of the largest logits with which the softmax weights, of the softmax over all of them, sum to
    ``p``; keys that are equal to the last of these are read too. The softmax is then that of the keys it reads alone.
    Which keys those are is a constant, without a gradient.

    **There is no speed in it**: every logit is computed and sorted in the forward pass and computed again in the
    backward pass, and single keys that are left out here and there leave no tile of a product empty. Plain PyTorch for
    any device, so far run on CPUs alone; some rows at a time, so that no ``N x M`` tensor is kept or built. Logits,
    softmax and sums are fp32 (fp64 for fp64 inputs). The backward pass finds the same keys by a number for each row,
    halfway between the last logit that is read and the first that is not, so that rounding does not decide. On a CPU,
    gradients are the same bit for bit on every run.

    Args:
        query: ``[B, Hq, N, D]``.
        key, value: ``[B, Hkv, M, D]`` with ``M >= N``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
        p: share of the weight, above 0 and up to 1, which reads every key.
        sinks: the first tokens of a document, which are always read and count as kept.
        window: the last tokens up to the row, itself included, likewise; with 0 the row itself is a key as any other.
        union: whether all query heads of a KV head read what any of them chose, as in :func:`listed_decode`. Without
            it each reads its own choice.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, which do not see each other. Needs
            ``B == 1`` and ``M == N``. Must rise from 0 to ``N``; read on the host.
        q_start: position of the first query among the keys; None means ``M - N``.
        scale: factor on the logits; None means ``D ** -0.5``.
        return_lse: also return the log of the softmax denominator, over the keys that are read. Differentiable.

    Returns:
        ``[B, Hq, N, D]`` in the query's dtype and, with ``return_lse``, fp32 ``[B, Hq, N]`` (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and its value.
    """
    check_number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is no share of the weight, above 0 and up to 1")
    check_count("sinks", sinks, 0, "0 always reads no first token")
    check_count("window", window, 0, "0 always reads no last token")
    inputs = check_inputs(query, key, value, cu_seqlens=cu_seqlens, q_start=q_start, scale=scale)
    choice = Choice(float(p), sinks, window, union)
    out, lse, _ = TopPAttention.apply(*inputs[:3], inputs.scale, choice, inputs.documents())
    return (out, lse) if return_lse else out
