"""The two operations as PyTorch knows them: opaque to ``torch.compile``, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.sparsek_decode import reference
from sparsetrain_kernels.sparsek_decode.slots import SparseKSlots

torch.library.define(
    "sparsetrain::sparsek_decode_update",
    "(Tensor key, Tensor value, Tensor scores, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor(d!) slot_scores, Tensor(e!) buffer, Tensor(f!) threshold, Tensor(g!) read, int topk, int window, "
    "int sinks, str backend) -> ()",
)
torch.library.define(
    "sparsetrain::sparsek_decode_attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor slot_scores, Tensor buffer, Tensor threshold, "
    "Tensor read, int topk, int sinks, str gate, float scale, Tensor? kept, str backend) -> Tensor",
)
_SLOTS = len(SparseKSlots._fields)


@torch.library.impl("sparsetrain::sparsek_decode_update", "default")
def _update(key: Tensor, value: Tensor, scores: Tensor, *args: Any) -> None:
    slots, (*shape, backend) = SparseKSlots._make(args[:_SLOTS]), args[_SLOTS:]
    if backend == "reference":
        reference.update(key, value, scores, slots, *shape)
        return
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.sparsek_decode.triton.launch import update

    update(key, value, scores, slots, *shape)


@torch.library.impl("sparsetrain::sparsek_decode_attention", "default")
def _attention(query: Tensor, *args: Any) -> Tensor:
    slots, (*options, backend) = SparseKSlots._make(args[:_SLOTS]), args[_SLOTS:]
    if backend == "reference":
        return reference.attend(query, slots, *options)
    from sparsetrain_kernels.sparsek_decode.triton.launch import attend

    return attend(query, slots, *options)


@torch.library.register_fake("sparsetrain::sparsek_decode_update")
def _update_fake(*args: Any) -> None:
    return None


@torch.library.register_fake("sparsetrain::sparsek_decode_attention")
def _attention_fake(query: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape)
