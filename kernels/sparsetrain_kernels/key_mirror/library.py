"""The operations as PyTorch knows them: opaque to ``torch.compile``, change the cache in place, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.key_mirror import reference
from sparsetrain_kernels.key_mirror.layout import KeyMirror, PageBounds

torch.library.define(
    "sparsetrain::append_tokens",
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor lengths, Tensor block_table, "
    "Tensor(c!)? codes, Tensor(d!)? scale_low, Tensor? center, Tensor? spread, Tensor(e!)? bounds, "
    "Tensor? bounds_center, Tensor? bounds_spread, str backend) -> ()",
)
torch.library.define(
    "sparsetrain::append_codes",
    "(Tensor key, Tensor lengths, Tensor block_table, Tensor(a!) codes, Tensor(b!) scale_low, Tensor center, "
    "Tensor spread, str backend) -> ()",
)


@torch.library.impl("sparsetrain::append_tokens", "default")
def _append(*args: Any) -> None:
    key, value, key_cache, value_cache, lengths, block_table, *own, values, center, spread, backend = args
    mirror = None if own[0] is None else KeyMirror._make(own)
    bounds = None if values is None else PageBounds(values, center, spread)
    if backend == "reference":
        reference.append(key, value, key_cache, value_cache, lengths, block_table, mirror, bounds)
        return
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.key_mirror.triton.launch import append

    append(key, value, key_cache, value_cache, lengths, block_table, mirror, bounds)


@torch.library.impl("sparsetrain::append_codes", "default")
def _append_codes(key: Tensor, lengths: Tensor, block_table: Tensor, *args: Any) -> None:
    *own, backend = args
    mirror = KeyMirror._make(own)
    if backend == "reference":
        reference.append_codes(key, lengths, block_table, mirror)
        return
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.key_mirror.triton.launch import append

    append(key, None, None, None, lengths, block_table, mirror, None)


@torch.library.register_fake("sparsetrain::append_tokens")
@torch.library.register_fake("sparsetrain::append_codes")
def _append_fake(key: Tensor, *args: Any) -> None:
    return None
