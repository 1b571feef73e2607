"""Launches the kernel that takes tokens into a cache. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.key_mirror.layout import BYTES, GRANULE, KeyMirror, PageBounds
from sparsetrain_kernels.key_mirror.triton.kernels import append_kernel
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device

LEAST = 32
"""Channels of half a head, at least, as tiles have them."""


def append(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    lengths: Tensor,
    block_table: Tensor,
    mirror: KeyMirror | None,
    bounds: PageBounds | None,
) -> None:
    """As :func:`sparsetrain_kernels.append_tokens`, and without values and caches :func:`sparsetrain_kernels.
    append_codes`."""
    batch, kv_heads, new, head_dim = key.shape
    tile = 1 if new == 1 else GRANULE
    # The first token may be the last of its 16.
    tiles = 1 if new == 1 else cdiv(new + GRANULE - 1, GRANULE)
    (lengths,) = row_major(lengths)
    table = consecutive_rows(block_table)
    values = None if bounds is None else bounds.values
    kind = "none" if values is None else "bytes" if values.dtype == BYTES else "keys"
    if values is not None and kind == "bytes":
        values = values.view(torch.uint8)
    moments = (None, None) if bounds is None else (bounds.center, bounds.spread)
    page = key_cache.shape[2] if key_cache is not None else mirror.codes.shape[2]  # type: ignore[union-attr]
    strides = [(0, 0, 0) if tensor is None else tensor.stride()[:3] for tensor in (value, key_cache, value_cache)]
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
                *(stride for each in strides for stride in each),
                *(table.stride(0), table.shape[1], new, tiles),
            ),
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            HALF_PAD=max(LEAST, next_power_of_2(head_dim // 2)),
            PAGE=page,
            TILE=tile,
            CACHE=key_cache is not None,
            MIRROR=mirror is not None,
            BOUNDS=kind,
            num_warps=1 if tile == 1 else 4,
        )
