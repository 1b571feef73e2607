"""The scores by which tokens compete: a linear network, timestep normalisation, and a slope (2406.16747, 3).

The network is a submodule of the attention layer and runs once a call, before the layer: what it returns is linear in
the input and knows no documents. Normalisation and slope count tokens from the start of their document, so they follow
where the documents are known, in the layer's attention.
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
"""Tokens that are lifted to fp32 at a time."""


class SparseKScorer(nn.Module):
    """One linear score a token and head, without activation or bias, and the gain of the normalisation.

    There is no learned offset: adding a constant to all scores of a head moves its threshold by as much and changes
    neither selection nor gates, so it would never get a gradient.

    Args:
        width: width of the layer's input.
        heads: scores a token: the KV heads, or 1 where they share a selection.
        normalize: scores are normalised, so their size is a parameter of its own: the gain, which acts as an inverse
            temperature of the soft selection.
        trainable: False makes the weights buffers: saved with the model, but nothing an optimizer could find.
    """

    def __init__(self, width: int, heads: int, *, normalize: bool, trainable: bool) -> None:
        super().__init__()
        self.heads, self.normalize, self.trainable = heads, normalize, trainable
        self.ready = True
        """False while the weights still wait to be fitted (``init: attention``)."""
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
        """Scores before normalisation, and the gain at every token.

        Computed in fp32 from whatever dtype the weights and inputs have, under autocast too (fp64 for fp64 inputs):
        in bf16, tens of thousands of scores would share a few hundred values and ties would decide. An engine that
        casts the model to bf16 stores these weights in bf16 as well; its optimizer keeps the fp32 master.

        Args:
            hidden_states: the layer's input ``[B, N, width]``.

        Returns:
            Scores ``[B, heads, N]``, and the gain expanded to the same shape (no memory of its own) or None without
            normalisation.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = _WideLinear.apply(hidden_states, self.weight).transpose(1, 2)
            if not self.normalize:
                return scores, None
            return scores, self.gain.to(scores.dtype)[:, None].expand_as(scores)


@dataclass(frozen=True)
class ScorerSpec:
    """What a layer's scorer has to be."""

    heads: int
    """Scores a token."""
    normalize: bool
    trainable: bool
    init: Literal["normal", "zeros", "attention"] | None
    """How it starts; None means ``normal``."""

    def fits(self, scorer: SparseKScorer) -> bool:
        """Whether a scorer that is there already will do."""
        wanted = (self.heads, self.normalize, self.trainable)
        waits_in_vain = not scorer.ready and self.init != "attention"
        return (scorer.heads, scorer.normalize, scorer.trainable) == wanted and not waits_in_vain

    def build(self, width: int) -> SparseKScorer:
        """A new scorer for inputs of ``width``."""
        scorer = SparseKScorer(width, self.heads, normalize=self.normalize, trainable=self.trainable)
        scorer.ready = self.init != "attention"
        if self.init in (None, "normal"):
            # Inputs are normalised to a mean square of 1, so that scores have a variance of 1.
            nn.init.normal_(scorer.weight, std=width**-0.5)
        return scorer


class _WideLinear(torch.autograd.Function):
    """``x @ weight.T`` in fp32 that keeps for backward only ``x`` as it came, which the layer's projections keep too.

    A plain ``linear(x.float(), ...)`` would keep an fp32 copy of the input of every layer.
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
    """Scores of ``scorer: random``: standard normal numbers that depend on layer, head and position alone.

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
