"""The scores that compete: timestep normalisation and a slope (2406.16747, 3), and where tokens stand for both."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.documents import from_documents, known_bounds
from sparsetrain_kernels.eager import apply
from sparsetrain_kernels.score_placement import reference
from sparsetrain_kernels.score_placement.library import PlaceScores
from sparsetrain_kernels.score_placement.reference import DocumentPositions, Moments


def document_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> DocumentPositions:
    """The positions of ``length`` tokens of one document, or of packed documents. Nothing is read on the host.

    Args:
        length: N, the number of tokens.
        cu_seqlens: int32 ``[documents + 1]``, the bounds of packed documents, or None for one document.
        device: where the positions go.

    Returns:
        Positions and first tokens, int64 ``[N]`` each.
    """

    def find() -> DocumentPositions:
        position = torch.arange(length, device=device)
        if cu_seqlens is None:
            return DocumentPositions(position, torch.zeros_like(position))
        first = known_bounds(length, cu_seqlens, device)[0].long()
        return DocumentPositions(position - first, first)

    return find() if cu_seqlens is None else from_documents(cu_seqlens, ("positions", length, device), find)


def place_scores(
    linear: Tensor,
    gain: Tensor | None,
    positions: DocumentPositions,
    slope: float,
    moments: Moments | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Moments | None]:
    """The scores that compete (2406.16747, section 3): normalised if there is a gain, plus ``slope`` times position.

    The normalisation is Megalodon's timestep normalisation (2404.08801, section 3.2), each head for itself. The slope
    joins after it. Before it, the slope's own spread would grow with the text until the normalised scores said where a
    token stands and nothing else.

    Args:
        linear: ``[B, heads, N]``, fp32 or fp64.
        gain: ``[B, heads, N]``, the factor on the normalised scores, or None.
        positions: of the tokens, int64 ``[N]`` or ``[B, N]`` each.
        slope: per position.
        moments: of the same documents' tokens in earlier calls, fp64 ``[B, heads]`` each, contiguous. For one token a
            row, as in generation, the kernel is one launch.
        backend: ``triton``, ``reference`` (plain PyTorch), or ``auto``: the first on CUDA where it can run. Sums run
            in fp64 in both, but in another order, so that a score may differ in its last bit.

    Returns:
        Scores ``[B, heads, N]`` in the dtype of ``linear``, and the moments after the last token, fp64 ``[B, heads]``
        each, or None without a gain.

    Raises:
        ValueError: the backend does not exist, or cannot run this.
    """
    needs_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (linear, gain))
    one = linear.shape[-1] == 1 and positions.position.dim() == 2 and not needs_grad
    refusals = {"gluon": "there is no Hopper version", "triton": _refusal(gain, positions, moments, one=one)}
    chosen = choose_backend(backend, linear, refusals)
    if gain is None or chosen == "reference":
        return reference.place_scores(linear, gain, positions, slope, moments)
    if moments is not None:
        scores, *after = torch.ops.sparsetrain.place_next_score(linear, gain, positions.position, *moments, slope)
        return scores, Moments(*after)
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    args = (linear, gain, positions.position, positions.first, slope)
    placed = apply(PlaceScores, *args) if needs_grad else torch.ops.sparsetrain.place_scores(*args)
    scores, total, squares = placed
    return scores, Moments(total[..., -1], squares[..., -1])


def _refusal(gain: Tensor | None, positions: DocumentPositions, moments: Moments | None, *, one: bool) -> str | None:
    if gain is None:
        return "without a gain nothing is normalised"
    if one and moments is not None and all(each.is_contiguous() for each in moments):
        return None
    if moments is not None or positions.position.dim() != 1:
        return "it normalises whole documents, at the same positions in all rows"
    return None
