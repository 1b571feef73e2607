"""The arguments of causal attention for chosen rows, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_tensors
from sparsetrain_kernels.inputs import check_inputs, consecutive_rows, row_major


class RowInputs(NamedTuple):
    """Checked arguments of one call. What the integer tensors hold is not checked: they may lie on a device."""

    query: Tensor
    """``[B, Hq, P, D]``; the elements of a row follow one another, in key and value too."""
    key: Tensor
    """``[B, Hkv, M, D]``."""
    value: Tensor
    query_positions: Tensor
    """int32 ``[P]``, rows of the keys, ascending."""
    cu_seqlens: Tensor | None
    """int32 ``[documents + 1]``, on the tensors' device."""
    scale: float

    def by_document(self) -> list[tuple[int, int, list[int]]]:
        """Of each document that has rows: its first key, its first row of the query, and the rows' places among the
        keys. Reads the integers on the host.

        Raises:
            ValueError: the positions do not ascend within the keys, or ``cu_seqlens`` does not from 0 to their number.
        """
        keys, places = self.key.shape[2], self.query_positions.tolist()
        if places != sorted(places) or places[0] < 0 or places[-1] >= keys:
            raise ValueError(
                f"query_positions={_short(places)} must ascend within 0 to {keys - 1}, the rows of the keys"
            )
        bounds = [0, keys] if self.cu_seqlens is None else self.cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != keys or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the number of keys, {keys}")
        found: list[tuple[int, int, list[int]]] = []
        document = 0
        for row, place in enumerate(places):
            while place >= bounds[document + 1]:
                document += 1
            if not found or found[-1][0] != bounds[document]:
                found.append((bounds[document], row, []))
            found[-1][2].append(place)
        return found


def check_row_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    *,
    cu_seqlens: Tensor | None,
    scale: float | None,
    others: Mapping[str, object],
) -> RowInputs:
    """Check shapes, dtypes and ranges, fill in the defaults, and lay the tensors out as the operations want them.

    Args:
        others: arguments that chosen rows cannot have; all of them must be None.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value; the message names it.
    """
    for name, value_given in others.items():
        if value_given is not None:
            shown = "a tensor" if isinstance(value_given, Tensor) else value_given
            raise ValueError(f"{name}={shown} cannot be combined with query_positions; leave one of them out")
    query, key, value, _, _, scale, *_ = check_inputs(query, key, value, scale=scale)
    check_tensors(query_positions=query_positions)
    if query_positions.dtype != torch.int32:
        raise TypeError(f"query_positions has dtype {query_positions.dtype}, expected torch.int32")
    if query_positions.shape != query.shape[2:3]:
        raise ValueError(
            f"query_positions has shape {tuple(query_positions.shape)}, expected one for each row of the query: "
            f"({query.shape[2]},)"
        )
    if cu_seqlens is not None:
        check_tensors(cu_seqlens=cu_seqlens)
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise TypeError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected int32 [documents + 1]"
            )
        if query.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs batch 1, got batch {query.shape[0]}")
        (cu_seqlens,) = row_major(cu_seqlens.to(query.device))
    (query_positions,) = row_major(query_positions.to(query.device))
    return RowInputs(
        consecutive_rows(query), consecutive_rows(key), consecutive_rows(value), query_positions, cu_seqlens, scale
    )


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 16 else f"[{', '.join(map(str, numbers[:8]))}, ..., {numbers[-1]}]"
