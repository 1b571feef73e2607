"""The operation as PyTorch knows it: opaque to ``torch.compile``, without a gradient, and visible to selective
activation checkpointing (``torch.ops.sparsetrain.key_choice.default`` can be saved instead of chosen again)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.key_choice import reference
from sparsetrain_kernels.key_choice.inputs import ChoiceInputs, whole_lists

torch.library.define(
    "sparsetrain::key_choice",
    "(Tensor query, Tensor key, Tensor lse, Tensor query_positions, Tensor? cu_seqlens, float scale, SymInt capacity, "
    "float p, str group, int width, SymInt sinks, SymInt window, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparsetrain::key_choice", "default")
def _choose(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, backend = ChoiceInputs._make(args[:-1]), args[-1]
    if backend == "reference":
        return reference.choose(inputs)
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.key_choice.triton.launch import choose

    return choose(inputs)


@torch.library.register_fake("sparsetrain::key_choice")
def _choose_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return whole_lists(ChoiceInputs._make(args[:-1]))
