"""SparseK's scores: a linear network, timestep normalisation, and a slope (2406.16747, section 3).

The network is a submodule of the attention layer and runs before the layer in each call. Its result is linear in the
input and does not depend on documents. Normalisation and slope depend on the position in the document, so they are
applied in the layer's attention, where documents are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sparsetrain_kernels.first_derivative import first_derivative_only
from sparsetrain_kernels.score_placement import DocumentPositions
from sparsetrain_kernels.score_placement.reference import per_head
from torch import Tensor, nn

CHUNK = 8192
"""Number of tokens converted to fp32 at once."""


class SparseKScorer(nn.Module):
    """One linear score per token and head, without activation or bias, and the gain of the normalisation.

    There is no learned offset: a constant added to all scores of a head shifts its threshold equally and changes
    neither selection nor gates, so it would never get a gradient.

    Args:
        width: Hidden size of the layer's input.
        heads: Scores per token: the number of KV heads, or 1 if they share a selection.
        normalize: Whether scores are normalised. Their scale is then a separate parameter: the gain, an inverse
            temperature of the soft selection.
        trainable: False makes the weights buffers, which are saved with the model but not optimised.
    """

    def __init__(self, width: int, heads: int, *, normalize: bool, trainable: bool) -> None:
        super().__init__()
        self.heads, self.normalize, self.trainable = heads, normalize, trainable
        self.ready = True
        """False until the weights are fitted (``init: attention``)."""
        self.weight: Tensor
        self.gain: Tensor
        self._register("weight", torch.zeros(heads, width))
        if normalize:
            self._register("gain", torch.ones(heads))

    def _register(self, name: str, tensor: Tensor) -> None:
        if self.trainable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = self.ready or f"{prefix}weight" in state_dict

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the scores before normalisation, and the gain at every token.

        They are computed in fp32 for all dtypes of weights and inputs, also under autocast (fp64 for fp64 inputs): in
        bf16, tens of thousands of scores would share a few hundred values and ties would decide. An engine that casts
        the model to bf16 stores these weights in bf16 too; its optimizer keeps the fp32 master weights.

        Args:
            hidden_states: The layer's input ``[B, N, width]``.

        Returns:
            Scores ``[B, heads, N]``, and the gain as an expanded view of the same shape, or None without normalisation.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = _WideLinear.apply(hidden_states, self.weight).transpose(1, 2)
            if not self.normalize:
                return scores, None
            return scores, self.gain.to(scores.dtype)[:, None].expand_as(scores)


@dataclass(frozen=True)
class ScorerSpec:
    """The properties of a layer's scorer."""

    heads: int
    """Scores per token."""
    normalize: bool
    trainable: bool
    init: Literal["normal", "zeros", "attention"] | None
    """Initialisation; None means ``normal``."""

    def fits(self, scorer: SparseKScorer) -> bool:
        """Whether an existing scorer has these properties."""
        wanted = (self.heads, self.normalize, self.trainable)
        waits_in_vain = not scorer.ready and self.init != "attention"
        return (scorer.heads, scorer.normalize, scorer.trainable) == wanted and not waits_in_vain

    def build(self, width: int) -> SparseKScorer:
        """Build a scorer for inputs of hidden size ``width``."""
        scorer = SparseKScorer(width, self.heads, normalize=self.normalize, trainable=self.trainable)
        scorer.ready = self.init != "attention"
        if self.init in (None, "normal"):
            # Inputs are normalised to a mean square of 1, so that scores have a variance of 1.
            nn.init.normal_(scorer.weight, std=width**-0.5)
        return scorer


class _WideLinear(torch.autograd.Function):
    """``x @ weight.T`` in fp32 that saves only the original ``x`` for backward, which the layer's projections save too.

    A plain ``linear(x.float(), ...)`` would save an fp32 copy of every layer's input.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(dtype).t()
        pieces = [piece.to(dtype) @ w for piece in x.split(CHUNK, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, need_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if need_x else None
        if not need_weight:
            return grad_x, None
        pairs = zip(grad.split(CHUNK, dim=1), x.split(CHUNK, dim=1), strict=True)
        parts = (g.flatten(0, 1).t() @ piece.to(g.dtype).flatten(0, 1) for g, piece in pairs)
        grad_weight = next(parts)
        for part in parts:
            grad_weight += part
        return grad_x, grad_weight.to(weight.dtype)


def hashed_scores(heads: int, layer_index: int, places: DocumentPositions, *, like: Tensor) -> Tensor:
    """Scores of ``scorer: random``: standard normal numbers that depend only on layer, head and position.

    Returns:
        ``[B, heads, N]`` for a batch of queries ``like`` ``[B, Hq, N, D]``, fp32 or fp64.
    """
    head = torch.arange(heads, device=like.device)[:, None] + heads * layer_index
    bits = per_head(places.position) * 0x9E3779B1 + head * 0x85EBCA77
    for multiplier in (0x7FEB352D, 0x846CA68B):  # a 32-bit integer hash ("lowbias32")
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> 16)) * multiplier
    uniform = ((bits & 0xFFFFFFFF) >> 8).double().add(0.5) / 2**24
    scores = math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)
    return scores.to(torch.promote_types(like.dtype, torch.float32)).expand(like.shape[0], -1, -1)
