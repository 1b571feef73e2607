"""What a sparse layer should have answered, in fp64 and by definition: slow, and sharing nothing with the kernels but
where SparseK placed its scores."""

from __future__ import annotations

from typing import Any

import torch
from sparsetrain_kernels.sparsek import find_places, place_scores
from torch import Tensor, nn

from sparsetrain.methods.base import Method
from sparsetrain.methods.sparsek import SparseKMethod
from sparsetrain.methods.sparsek_scorer import hashed_scores
from sparsetrain.methods.static import StaticMethod

PATTERN_TOKENS = 2048
"""How far into a document a pattern is checked; its mask grows with the square."""
SELECTION_ROWS = 32
"""Tokens of a document at which a selection is checked, evenly spread; each reads the whole document."""


def has_oracle(method: Method | None) -> bool:
    """Whether :func:`expected` knows the method."""
    return isinstance(method, StaticMethod | SparseKMethod)


def expected(
    method: Method, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any], document: slice
) -> tuple[Tensor, Tensor]:
    """The output of ``method.attend(layer, query, key, value, **call)`` at some rows of one document of a packed row.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        document: its rows.

    Returns:
        int64 ``[R]``, the rows; and fp64 ``[1, Hq, R, D]``.
    """
    if isinstance(method, StaticMethod):
        return _pattern(method, query, key, value, call, document)
    assert isinstance(method, SparseKMethod)
    return _selection(method, layer, query, key, value, call, document)


def _pattern(
    method: StaticMethod, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any], document: slice
) -> tuple[Tensor, Tensor]:
    from sparsetrain_kernels import block_pattern_attention_dense

    rows = torch.arange(document.start, min(document.stop, document.start + PATTERN_TOKENS), device=query.device)
    out, _ = block_pattern_attention_dense(
        query[:, :, rows].double(),
        key[:, :, rows].double(),
        value[:, :, rows].double(),
        method.pattern,
        scale=call["scale"],
        softcap=call["softcap"],
        sink_logits=call["sink_logits"],
    )
    return rows, out


def _selection(
    method: SparseKMethod,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: dict[str, Any],
    document: slice,
) -> tuple[Tensor, Tensor]:
    """SparseK row by row (2406.16747, 3): who competes, the threshold, the gates, and attention over what is left."""
    config, length = method.config, document.stop - document.start
    # In the whole row, as the layer placed them: rounded otherwise, two near scores could change places.
    places = find_places(query.shape[2], call["cu_seqlens"], query.device)
    linear = call.get("sparsek_scores")
    if linear is None:
        linear = hashed_scores(method.score_heads, layer.layer_idx, places, like=query)
    placed, _ = place_scores(linear, call.get("sparsek_gain"), places, config.slope)
    scores = placed[0, :, document].double()
    key, value = (tensor[0, :, document].double() for tensor in (key, value))
    tokens = torch.arange(length, device=query.device)
    checked = tokens[torch.linspace(0, length - 1, min(SELECTION_ROWS, length), device=query.device).long()]
    answers = []
    for row in checked.tolist():
        always = (tokens < config.sinks) | (tokens > row - config.window)
        competes = ~always & (tokens <= row)
        gates = torch.where(competes, _gates(scores, competes, config.topk), 1.0)
        chosen = _largest(scores, competes, config.topk)
        seen = (tokens <= row) & (always | chosen)
        heads = query[0, :, document][:, row].double().unflatten(0, (key.shape[0], -1))
        logits = (heads @ key.mT) * call["scale"] + (gates.log()[:, None] if config.gate == "log" else 0.0)
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        if config.gate == "value":
            weights = weights * gates[:, None]
        answers.append((weights @ value).flatten(0, 1))
    return checked + document.start, torch.stack(answers, dim=1)[None]


def _gates(scores: Tensor, competes: Tensor, topk: int) -> Tensor:
    """``clip(u - tau, 0, 1)``, with the tau at which the competing gates sum to ``topk``, found by bisection."""
    if int(competes.sum()) <= topk:
        return torch.ones_like(scores)
    low, high = scores.amin(-1, keepdim=True) - 1.0, scores.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        over = ((scores - middle).clamp(0.0, 1.0) * competes).sum(-1, keepdim=True) > topk
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (scores - (low + high) / 2).clamp(0.0, 1.0)


def _largest(scores: Tensor, competes: Tensor, topk: int) -> Tensor:
    """The ``topk`` largest competing scores as a mask; of equal ones the newer wins."""
    newest_first = scores.masked_fill(~competes, float("-inf")).flip(-1)
    rank = newest_first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).flip(-1)
    return competes & (rank < topk)
