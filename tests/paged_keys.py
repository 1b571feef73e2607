"""A paged cache of keys with its mirror and bounds, for the tests of both operations, and what is in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sparsetrain_kernels import KeyMirror, PageBounds, append_tokens, key_statistics
from torch import Tensor


class PagedKeys(NamedTuple):
    """Two sequences or more in pages that lie anywhere; what no token was written to is NaN."""

    key: Tensor
    """``[B, Hkv, N, D]``, with padding of NaN before the shorter sequences."""
    value: Tensor
    lengths: Tensor
    table: Tensor
    key_cache: Tensor
    value_cache: Tensor
    mirror: KeyMirror
    bounds: PageBounds

    def places(self) -> dict[str, Tensor]:
        return {"lengths": self.lengths, "block_table": self.table}

    def kept(self) -> Tensor:
        """Which positions lie on a page, ``[B, N]``."""
        position = torch.arange(self.key.shape[2], device=self.key.device)
        page = self.table.long()[:, position // self.key_cache.shape[2]]
        return (position < self.lengths[:, None]) & (page >= 0)

    def keys(self) -> Tensor:
        """fp64 ``[B, Hkv, N, D]`` in the order of positions; 0 where there is none."""
        ordered = torch.zeros_like(self.key, dtype=torch.float64)
        for b, length in enumerate(self.lengths.tolist()):
            ordered[b, :, :length] = self.key[b, :, self.key.shape[2] - length :].double()
        return ordered

    def append(self, rows: slice, lengths: Tensor, backend: str) -> None:
        """Take some of the tokens in, after which there are ``lengths``."""
        append_tokens(
            self.key[:, :, rows],
            self.value[:, :, rows],
            self.key_cache,
            self.value_cache,
            lengths=lengths,
            block_table=self.table,
            mirror=self.mirror,
            bounds=self.bounds,
            backend=backend,
        )


def paged_keys(
    lengths: tuple[int, ...],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 32,
    dtype: torch.dtype = torch.float32,
    bytes_: bool = False,
    dead: tuple[tuple[int, int], ...] = (),
    device: str = "cpu",
) -> PagedKeys:
    """An empty cache for sequences of these lengths. Channels have means and spreads of their own. ``dead`` are pairs
    of a sequence and the number of one of its pages, which is not kept."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, tokens = len(lengths), max(lengths)
    spread = 0.25 + random(kv_heads, 1, head_dim).square()
    key = random(batch, kv_heads, tokens, head_dim) * spread + 2 * random(kv_heads, 1, head_dim)
    value = random(batch, kv_heads, tokens, head_dim)
    for b, length in enumerate(lengths):
        key[b, :, : tokens - length] = value[b, :, : tokens - length] = float("nan")
    # Tokens before heads in memory, as models have them.
    key, value = (t.transpose(1, 2).contiguous().transpose(1, 2).to(device, dtype) for t in (key, value))
    per_row = -(-tokens // page)
    pages = batch * per_row + 2
    table = torch.randperm(pages, generator=generator)[: batch * per_row].view(batch, per_row).to(device, torch.int32)
    for b, number in dead:
        table[b, number] = -1
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    center, spread = key_statistics(key, on_device)

    def nan(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, float("nan"), device=device).to(dtype)

    mirror = KeyMirror(
        torch.full((pages, kv_heads, page, head_dim // 2), 255, dtype=torch.uint8, device=device),
        nan(pages, kv_heads, page, 2, dtype=torch.float16),
        center,
        spread,
    )
    values = nan(pages, kv_heads, page // 16, 2, head_dim, dtype=torch.float8_e4m3fn if bytes_ else dtype)
    bounds = PageBounds(values, center, spread) if bytes_ else PageBounds(values)
    cache: Any = (nan(pages, kv_heads, page, head_dim) for _ in range(2))
    return PagedKeys(key, value, on_device, table, *cache, mirror, bounds)


def by_position(pages: Tensor, keys: PagedKeys) -> Tensor:
    """``[pages, Hkv, page, ...]`` as ``[B, Hkv, N, ...]``; page 0 stands in for those that are not kept."""
    tokens = pages[keys.table.long().clamp(min=0)].transpose(1, 2).flatten(2, 3)
    return tokens[:, :, : keys.key.shape[2]]
