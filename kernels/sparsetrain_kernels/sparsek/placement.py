"""The scores that compete: timestep normalisation and a slope (2406.16747, 3), and where tokens stand for both."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.backend import choose_backend
from sparsetrain_kernels.documents import from_documents, known_bounds
from sparsetrain_kernels.sparsek.placement_library import Placement
from sparsetrain_kernels.sparsek.placement_reference import Moments, Places, place


def find_places(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Places:
    """The places of ``length`` tokens of one document, or of the packed documents ``cu_seqlens``. Never syncs."""

    def find() -> Places:
        position = torch.arange(length, device=device)
        if cu_seqlens is None:
            return Places(position, torch.zeros_like(position))
        first = known_bounds(length, cu_seqlens, device)[0].long()
        return Places(position - first, first)

    return find() if cu_seqlens is None else from_documents(cu_seqlens, ("places", length, device), find)


def place_scores(
    linear: Tensor,
    gain: Tensor | None,
    places: Places,
    slope: float,
    moments: Moments | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Moments | None]:
    """The scores that compete: normalised if there is a gain, plus ``slope`` times the position.

    The slope joins after the normalisation. Before it, the slope's own spread would grow with the text until the
    normalised scores said where a token stands and nothing else.

    Args:
        linear: fp32 or fp64 ``[B, heads, N]``.
        gain: like ``linear``, or None.
        places: places of the N tokens.
        slope: per position.
        moments: of the same documents' tokens in earlier calls.
        backend: ``triton``, ``reference`` (plain PyTorch), or ``auto``: the first on CUDA where it can run. Sums run
            in fp64 in both, but in another order, so that a score may differ in its last bit.

    Returns:
        Scores ``[B, heads, N]`` in the dtype of ``linear``, and the moments after the last token.

    Raises:
        ValueError: the backend does not exist, or cannot run this.
    """
    refusals = {"gluon": "there is no Hopper version", "triton": _refusal(gain, places, moments)}
    chosen = choose_backend(backend, linear, refusals)
    if gain is None or chosen == "reference":
        return place(linear, gain, places, slope, moments)
    needs_grad = torch.is_grad_enabled() and (linear.requires_grad or gain.requires_grad)
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    run = Placement.apply if needs_grad else torch.ops.sparsetrain.place_scores
    scores, total, squares = run(linear, gain, places.position, places.first, slope)
    return scores, Moments(total[..., -1], squares[..., -1])


def _refusal(gain: Tensor | None, places: Places, moments: Moments | None) -> str | None:
    if gain is None:
        return "without a gain nothing is normalised"
    if moments is not None or places.position.dim() != 1:
        return "it normalises whole documents, at the same places in all rows"
    return None
