"""The arguments of a choice of keys, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_count, check_tensors
from sparsetrain_kernels.dense.row_inputs import RowInputs, check_row_inputs


class ChoiceInputs(NamedTuple):
    """Checked arguments of one call. No value of an integer tensor is among what is checked."""

    query: Tensor
    """``[B, Hq, P, D]``; the elements of a row follow one another, in key too."""
    key: Tensor
    """``[B, Hkv, M, D]``."""
    lse: Tensor
    """fp32 ``[B, Hq, P]``, contiguous."""
    query_positions: Tensor
    """int32 ``[P]``."""
    cu_seqlens: Tensor | None
    scale: float
    capacity: int
    p: float
    """Share of the weight; 0 for the ``capacity`` heaviest keys."""
    group: str
    width: int
    sinks: int
    window: int

    def rows(self) -> RowInputs:
        """The same rows as attention takes them."""
        return RowInputs(self.query, self.key, self.key, self.query_positions, self.cu_seqlens, self.scale)


def check_choice(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_positions: Tensor,
    *,
    capacity: int,
    p: float,
    group: str,
    width: int,
    sinks: int,
    window: int,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> ChoiceInputs:
    """Check shapes, dtypes and ranges, and lay the tensors out as the operation wants them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    rows = check_row_inputs(query, key, key, query_positions, cu_seqlens=cu_seqlens, scale=scale, others={})
    check_tensors(lse=lse)
    if lse.shape != rows.query.shape[:3]:
        raise ValueError(f"lse has shape {tuple(lse.shape)}, expected one number a row: {tuple(rows.query.shape[:3])}")
    if not lse.is_floating_point() or lse.device != query.device:
        raise TypeError(f"lse is {lse.dtype} on {lse.device}, expected fp32 on {query.device}")
    check_count("sinks", sinks, 0)
    check_count("window", window, 0)
    return ChoiceInputs(
        rows.query.detach(),
        rows.key.detach(),
        lse.detach().float().contiguous(),
        rows.query_positions,
        rows.cu_seqlens,
        rows.scale,
        capacity,
        p,
        group,
        width,
        sinks,
        window,
    )


def whole_lists(inputs: ChoiceInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the result: ``lists [B, Hkv, P, capacity]``, ``counts`` and ``dropped [B, Hkv, P]``, int32."""
    batch, heads = inputs.key.shape[:2]
    shape = (batch, heads, inputs.query.shape[2])
    new = inputs.query_positions.new_empty
    lists: Tensor = new((*shape, inputs.capacity))
    return lists, new(shape), torch.empty(shape, dtype=torch.int32, device=inputs.query.device)
