"""The operation as PyTorch knows it: opaque to ``torch.compile``, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_decode.inputs import DecodeInputs
from sparsetrain_kernels.block_decode.reference import decode_by_gathering
from sparsetrain_kernels.block_pattern.pattern import BlockLists

_INPUTS = len(DecodeInputs._fields)

torch.library.define(
    "sparsetrain::block_pattern_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? block_table, int max_length, "
    "float scale, float? softcap, Tensor? sink_logits, int? token_window, int block, int window, int num_sinks, "
    "int heads, int period, int[] far, str backend) -> (Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::block_pattern_decode", "default")
def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = DecodeInputs._make(args[:_INPUTS])
    *numbers, far, backend = args[_INPUTS:]
    # What each key block is read by is a question of backward passes.
    lists = BlockLists._make((*numbers, tuple(far), ()))
    if backend == "reference":
        return decode_by_gathering(inputs, lists)
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.block_decode.triton.launch import decode

    return decode(inputs, lists)


@torch.library.register_fake("sparsetrain::block_pattern_decode")
def _decode_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=dtype)
