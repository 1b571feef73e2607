"""The operation as PyTorch knows it: opaque to ``torch.compile``, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.list_decode.inputs import ListedInputs
from sparsetrain_kernels.list_decode.reference import attend_by_gathering

torch.library.define(
    "sparsetrain::listed_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lists, Tensor counts, Tensor lengths, "
    "Tensor block_table, Tensor? recents, Tensor? since, int recent, int sinks, float scale, float? softcap, "
    "Tensor? sink_logits, str backend) -> (Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::listed_decode", "default")
def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, backend = ListedInputs._make(args[:-1]), args[-1]
    if backend == "reference":
        return attend_by_gathering(inputs)
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.list_decode.triton.launch import decode

    return decode(inputs)


@torch.library.register_fake("sparsetrain::listed_decode")
def _decode_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=dtype)
