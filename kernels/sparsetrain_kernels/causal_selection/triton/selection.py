"""The causal selection by Triton kernels: the same integers and thresholds as plain PyTorch, in few launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.axis import ONE, with_one_nan
from sparsetrain_kernels.causal_selection.triton import selection_kernels as kernels
from sparsetrain_kernels.causal_selection.triton.crossing import find_first_rows
from sparsetrain_kernels.documents import known_bounds
from sparsetrain_kernels.inputs import row_major
from sparsetrain_kernels.launching import cdiv, launch, on_device

BLOCK = 256
"""Tokens of a program that goes over all tokens once."""


def select(scores: Tensor, topk: int, window: int, sinks: int, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """The fields of :class:`~sparsetrain_kernels.causal_selection.CausalSelection`."""
    (scores,) = row_major(scores)
    tokens, total, device = scores.shape[2], scores.numel(), scores.device
    topk, window, sinks = (min(number, tokens) for number in (topk, window, sinks))
    heads = total // tokens
    with on_device(scores):
        ordered, order, doc_start, doc_end = _sort(scores.view(heads, tokens), cu_seqlens)
        packed: dict[str, Any] = {"PACKED": cu_seqlens is not None, "BLOCK": BLOCK}
        programs = cdiv(total, BLOCK)
        axis = torch.empty(total, dtype=torch.int64, device=device)
        arrival = torch.empty((heads, tokens), dtype=torch.int64, device=device)
        rank_arrival, rank_entry, better_row = torch.empty(
            (3, heads, tokens), dtype=torch.int32, device=device
        ).unbind()
        sums = torch.empty((2, total + 1), dtype=torch.int64, device=device)
        launch(
            kernels.selection_gaps_kernel,
            cdiv(total + 1, BLOCK),
            (ordered, doc_start, axis, arrival, rank_arrival, sums),
            (total, tokens),
            **packed,
        )
        axis = axis.cumsum(0)

        point = torch.empty((heads, 2 * tokens), dtype=torch.int64, device=device)
        point_entry, point_key = torch.empty((2, heads, 2 * tokens), dtype=torch.int32, device=device).unbind()
        place_of_points = torch.empty((2, total), dtype=torch.int32, device=device)
        first_row = torch.empty((heads, 2 * tokens), dtype=torch.int32, device=device)
        launch(
            kernels.selection_points_kernel,
            programs,
            (
                axis,
                order,
                doc_start,
                doc_end,
                arrival,
                rank_arrival,
                rank_entry,
                point,
                point_entry,
                point_key,
                place_of_points,
                first_row,
                better_row,
            ),
            (total, tokens, window, sinks, tokens.bit_length()),
            **packed,
        )
        find_first_rows(arrival, point, point_entry, first_row, 2 * ONE, topk * 2 * ONE)
        find_first_rows(rank_arrival, None, rank_entry, better_row, 1, topk - 1)

        exit, interior_start, interior_end, interior_size, saturated_size = torch.empty(
            (5, *scores.shape), dtype=torch.int32, device=device
        ).unbind()
        launch(
            kernels.selection_intervals_kernel,
            programs,
            (
                axis,
                order,
                doc_start,
                doc_end,
                first_row,
                better_row,
                place_of_points,
                exit,
                interior_start,
                interior_end,
                *sums.unbind(),
            ),
            (total, tokens, window, sinks),
            **packed,
        )
        threshold = torch.empty(scores.shape, dtype=scores.dtype, device=device)
        launch(
            kernels.selection_thresholds_kernel,
            programs,
            (
                ordered,
                axis,
                doc_start,
                first_row,
                point_key,
                # One running sum for both: whatever comes also goes, so that the first ends at 0.
                *sums.view(-1).cumsum(0).view(sums.shape).unbind(),
                threshold,
                interior_size,
                saturated_size,
            ),
            (total, tokens, window, sinks, topk, (2 * tokens).bit_length()),
            **packed,
        )
    return threshold, exit, interior_start, interior_end, interior_size, saturated_size


def _sort(scores: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Scores ascending within each document, of equal ones the older first; the tokens they are of; the documents."""
    if cu_seqlens is None:
        return *with_one_nan(scores).sort(dim=-1, stable=True), None, None
    start, end = known_bounds(scores.shape[1], cu_seqlens, scores.device)
    if scores.dtype == torch.float32:
        total = scores.numel()
        key = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
        programs = cdiv(total, BLOCK)
        launch(
            kernels.selection_keys_kernel,
            programs,
            (scores, start, key),
            (total, scores.shape[1]),
            BLOCK=BLOCK,
        )
        order = key.argsort(dim=-1, stable=True)
        return scores.gather(-1, order), order, start, end
    ordered, order = with_one_nan(scores).sort(dim=-1, stable=True)
    # Also stable: within a document, the order by score stays.
    by_document = start[order].argsort(dim=-1, stable=True)
    return ordered.gather(-1, by_document), order.gather(-1, by_document), start, end
