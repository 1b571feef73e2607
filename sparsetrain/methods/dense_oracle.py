"""The oracle of methods whose pairs are a mask: attention with all logits in memory, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsetrain.methods.base import Expected

if TYPE_CHECKING:
    import torch

CHECKED_TOKENS = 2048
"""How far into a document the oracle goes; its mask grows with the square."""


def expected_at_the_start(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document: slice,
    options: Mapping[str, Any],
) -> Expected:
    """What a layer should have answered at the first tokens of a document.

    Args:
        attention: takes query, key, value, ``scale``, ``softcap`` and ``sink_logits``; returns output and log-sum-exp.
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        document: the document's place among the N tokens.
        options: of :meth:`Method.attend`.
    """
    import torch

    stop = min(document.stop, document.start + CHECKED_TOKENS)
    rows = torch.arange(document.start, stop, device=query.device)
    q, k, v = (tensor[:, :, rows].double() for tensor in (query, key, value))
    settings = {name: options.get(name) for name in ("scale", "softcap", "sink_logits")}
    out, _ = attention(q, k, v, **settings)
    return Expected(rows, out)
