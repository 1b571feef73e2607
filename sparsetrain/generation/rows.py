"""Rows of a batch that differ in padding, packed into one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PackedRows:
    """The real tokens of rows that are padded on the left, as one row of documents.

    Args:
        starts: of each row, how many tokens are padding.
        tokens: tokens of a row, padding included.
    """

    def __init__(self, starts: Sequence[int], tokens: int, device: torch.device) -> None:
        self.shape = (len(starts), tokens)
        real = torch.arange(tokens) >= torch.tensor(starts)[:, None]
        ends = real.sum(1).cumsum(0)
        # A row of nothing but padding is no document.
        self.cu_seqlens = torch.cat([ends.new_zeros(1), ends]).unique_consecutive().int().to(device)
        self.index = real.flatten().nonzero()[:, 0].to(device)

    def pack(self, tensor: Tensor) -> Tensor:
        """``[B, H, N, ...]`` to ``[1, H, real tokens, ...]``."""
        return tensor.transpose(1, 2).flatten(0, 1).index_select(0, self.index).transpose(0, 1)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to ``[B, H, N, D]``, zeros on padding."""
        rows = packed[0].transpose(0, 1)
        out = rows.new_zeros(self.shape[0] * self.shape[1], *rows.shape[1:])
        return out.index_copy(0, self.index, rows).unflatten(0, self.shape).transpose(1, 2)
