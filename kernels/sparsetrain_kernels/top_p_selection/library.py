"""The operation as PyTorch knows it: opaque to ``torch.compile``, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.top_p_selection import reference
from sparsetrain_kernels.top_p_selection.selection import PositionLists, SelectionInputs

_INPUTS = len(SelectionInputs._fields)

_ARGUMENTS = (
    "Tensor scores, Tensor? lse, Tensor lengths, Tensor? page_lists, Tensor? page_counts, Tensor? p_heads, "
    "Tensor? recents, float p, int recent, int sinks, int kv_heads, str group, int width, int min_keys, int capacity, "
    "bool newest, Tensor? due, str backend"
)
torch.library.define("sparsetrain::position_lists", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "sparsetrain::position_lists_into",
    f"({_ARGUMENTS}, Tensor(a!) lists, Tensor(b!) counts, Tensor(c!) dropped) -> ()",
)


@torch.library.impl("sparsetrain::position_lists", "default")
def _select(*args: Any) -> PositionLists:
    inputs, backend = SelectionInputs._make(args[:_INPUTS]), args[_INPUTS]
    each, new = (inputs.scores.shape[0], inputs.kv_heads), inputs.lengths.new_empty
    found = PositionLists(new((*each, inputs.capacity)), new(each), new(each))
    _write(inputs, backend, found)
    return found


@torch.library.impl("sparsetrain::position_lists_into", "default")
def _select_into(*args: Any) -> None:
    _write(SelectionInputs._make(args[:_INPUTS]), args[_INPUTS], PositionLists(*args[_INPUTS + 1 :]))


def _write(inputs: SelectionInputs, backend: str, into: PositionLists) -> None:
    if backend == "reference":
        reference.select(inputs, into)
        return
    # Imported on first use: Triton may be absent.
    from sparsetrain_kernels.top_p_selection.triton.launch import select

    select(inputs, into)


@torch.library.register_fake("sparsetrain::position_lists")
def _select_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = SelectionInputs._make(args[:_INPUTS])
    each = (inputs.scores.shape[0], inputs.kv_heads)
    lists = inputs.lengths.new_empty((*each, inputs.capacity))
    return lists, inputs.lengths.new_empty(each), inputs.lengths.new_empty(each)


@torch.library.register_fake("sparsetrain::position_lists_into")
def _select_into_fake(*args: Any) -> None:
    return None
