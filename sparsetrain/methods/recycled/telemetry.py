"""How much of the softmax weight the keys that are read hold, by layer and by the age of their choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sparsetrain_kernels import causal_attention
from torch import Tensor

from sparsetrain.methods.recycled.segments import Segments, on_device

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are spread evenly and repeat no distance."""
SAMPLED = 64
"""Rows of a layer whose whole weight is computed in a logged step."""


def observer(seen: list[dict[str, Tensor]], layer: int, longest: int) -> Callable[..., None]:
    """Adds the shares of sampled rows of a call to ``seen``, by name: their sum and number, fp64 ``[2]``.

    Args:
        layer: Index of the layer.
        longest: Tokens of the longest segment, by which ages are divided.
    """

    @torch.no_grad()
    def observe(
        query: Tensor, key: Tensor, value: Tensor, lse: Tensor, segments: Segments, cu_seqlens: Any, scale: float
    ) -> None:
        # Not evenly spaced, or all might have one age.
        index = (torch.arange(SAMPLED, dtype=torch.float64) * GOLDEN % 1 * query.shape[2]).int().unique()
        rows = on_device(index, query.device)
        age = rows - segments.starts[torch.searchsorted(segments.starts, rows, right=True) - 1]
        options = {"query_positions": rows, "cu_seqlens": cu_seqlens, "scale": scale}
        rows = rows.long()
        _, whole = causal_attention(query[:, :, rows], key, value, return_lse=True, **options)
        read = lse[0, :, rows]
        # Rows that attend fully have no log-sum-exp here.
        counted = read[0] > float("-inf")
        share = ((read - whole[0]).exp().mean(0).double()).where(counted, 0.0)
        found = {f"layer_{layer:02}": torch.stack([share.sum(), counted.sum().double()])}
        low = 1
        while low < max(longest, 2):
            of_age = counted & (age >= low) & (age < 2 * low)
            found[f"age_{low:04}"] = torch.stack([(share * of_age).sum(), of_age.sum().double()])
            low *= 2
        seen.append(found)

    return observe


def means(seen: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The mean share of sums and numbers ``[2]`` by name, such as ``recycled/kept_mass/age_0004``, which is that of the
    ages 4 to 7. What no sampled row has is left out."""
    if not seen:
        return {}
    totals: dict[str, Tensor] = {}
    for found in seen:
        for name, pair in found.items():
            totals[name] = totals[name] + pair if name in totals else pair
    # One copy from the device for all values.
    numbers = torch.stack(list(totals.values())).tolist()
    pairs = sorted(zip(totals, numbers, strict=True))
    return {f"recycled/kept_mass/{name}": total / count for name, (total, count) in pairs if count > 0}
