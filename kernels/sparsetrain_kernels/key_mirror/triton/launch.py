"""Launches the kernel that takes tokens into a cache. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.key_mirror.layout import BYTES, GRANULE, KeyMirror, PageBounds
from sparsetrain_kernels.key_mirror.triton.kernels import append_kernel
from sparsetrain_kernels.launching import launch, on_device

LEAST = 32
"""Channels of half a head, at least, as tiles have them."""


def append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    mirror: KeyMirror | None,
    bounds: PageBounds | None,
) -> None:
    """As :func:`sparsetrain_kernels.append_tokens`."""
    batch, kv_heads, new, head_dim = key.shape
    tile = 1 if new == 1 else GRANULE
    # The first token may be the last of its 16.
    tiles = 1 if new == 1 else triton.cdiv(new + GRANULE - 1, GRANULE)
    (lengths,) = row_major(lengths)
    table = consecutive_rows(block_table)
    values = None if bounds is None else bounds.values
    kind = "none" if values is None else "bytes" if values.dtype == BYTES else "keys"
    if values is not None and kind == "bytes":
        values = values.view(torch.uint8)
    moments = (None, None) if bounds is None else (bounds.center, bounds.spread)
    with on_device(key):
        launch(
            append_kernel,
            tiles * kv_heads * batch,
            (
                *(key, value, key_cache, value_cache, lengths, table),
                *(mirror or (None,) * len(KeyMirror._fields)),
                *(values, *moments),
            ),
            (
                *key.stride()[:3],
                *value.stride()[:3],
                *key_cache.stride()[:3],
                *value_cache.stride()[:3],
                *(table.stride(0), table.shape[1], new, tiles),
            ),
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            HALF_PAD=max(LEAST, triton.next_power_of_2(head_dim // 2)),
            PAGE=key_cache.shape[2],
            TILE=tile,
            MIRROR=mirror is not None,
            BOUNDS=kind,
            num_warps=1 if tile == 1 else 4,
        )
