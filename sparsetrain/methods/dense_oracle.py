"""The oracle of methods that can be written as a mask: attention with all logits in memory, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsetrain.methods.base import Expected

if TYPE_CHECKING:
    import torch

CHECKED_TOKENS = 2048
"""Number of tokens of a document that the oracle covers; its mask grows quadratically."""


def expected_at_the_start(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document: slice,
    options: Mapping[str, Any],
) -> Expected:
    """The expected output of a layer at the first tokens of a document, in fp64.

    Args:
        attention: Takes query, key, value, ``scale``, ``softcap`` and ``sink_logits``; returns output and log-sum-exp.
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.
        document: The positions of the document among the N tokens.
        options: The options of :meth:`Method.attend`.

    Returns:
        The positions, and the output there: fp64 ``[1, Hq, R, D]``.
    """
    import torch

    stop = min(document.stop, document.start + CHECKED_TOKENS)
    rows = torch.arange(document.start, stop, device=query.device)
    q, k, v = (tensor[:, :, rows].double() for tensor in (query, key, value))
    settings = {name: options.get(name) for name in ("scale", "softcap", "sink_logits")}
    out, _ = attention(q, k, v, **settings)
    return Expected(rows, out)
