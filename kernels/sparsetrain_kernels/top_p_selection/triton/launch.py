"""Launches the kernels of a selection. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.launching import launch, on_device
from sparsetrain_kernels.top_p_selection.selection import PositionLists, SelectionInputs
from sparsetrain_kernels.top_p_selection.triton import lists, thresholds
from sparsetrain_kernels.top_p_selection.triton.configs import (
    ALONE,
    CANDIDATES,
    CHUNK,
    DEVIATIONS,
    NUM_WARPS,
    PIECE,
    SAMPLE,
    TILE,
)


def select(call: SelectionInputs) -> PositionLists:
    """As :func:`sparsetrain_kernels.top_p_selection.reference.select`."""
    with on_device(call.scores):
        call = _with_consecutive_rows(call)
        if call.group != "union":
            call = _pooled(call)
        return _lists(call, _thresholds(call))


def _with_consecutive_rows(call: SelectionInputs) -> SelectionInputs:
    lse, lengths = row_major(call.lse, call.lengths)
    return call._replace(
        scores=consecutive_rows(call.scores),
        lse=lse,
        lengths=lengths,
        page_lists=None if call.page_lists is None else consecutive_rows(call.page_lists),
        page_counts=None if call.page_counts is None else call.page_counts.contiguous(),
        p_heads=None if call.p_heads is None else call.p_heads.contiguous(),
        recents=None if call.recents is None else call.recents.contiguous(),
    )


def _pooled(call: SelectionInputs) -> SelectionInputs:
    """The same selection from one row of log weights a KV head."""
    batch, heads, columns = call.scores.shape
    chunks = triton.cdiv(columns, CHUNK)
    programs = batch * call.kv_heads * chunks
    pooled = call.scores.new_empty((batch, call.kv_heads, columns))
    launch(
        lists.pool_heads_kernel,
        programs,
        (call.scores, call.lse, call.lengths, call.page_lists, call.page_counts, pooled),
        (*call.scores.stride()[:2], *_page_strides(call), columns, chunks),
        KV_HEADS=call.kv_heads,
        GROUP=heads // call.kv_heads,
        MEAN=call.group == "mean",
        PAGES=call.page_lists is not None,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )
    if call.width > 1:
        rows, pooled = pooled, torch.empty_like(pooled)
        launch(
            lists.pool_neighbours_kernel,
            programs,
            (rows, call.page_lists, pooled),
            (*_page_strides(call), columns, chunks),
            KV_HEADS=call.kv_heads,
            WIDTH=call.width,
            PAGES=call.page_lists is not None,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )
    p_heads = call.p_heads
    if p_heads is not None:
        p_heads = p_heads.view(call.kv_heads, -1).amax(1)
    lse = call.lse.new_zeros((batch, call.kv_heads))
    return call._replace(scores=pooled, lse=lse, p_heads=p_heads, group="union", width=1)


def _thresholds(call: SelectionInputs) -> Tensor:
    """The least score that stays of each row, fp32 ``[B, rows]``."""
    batch, heads, columns = call.scores.shape
    rows = batch * heads
    bracket = columns > ALONE
    threshold = call.lse.new_empty((batch, heads))
    about = (call.scores, call.lse, call.lengths, call.recents, call.page_lists, call.page_counts)
    strides = (*call.scores.stride()[:2], *_page_strides(call), columns, call.recent, call.sinks)
    options = {
        "KV_HEADS": call.kv_heads,
        "HEADS": heads,
        "RECENTS": call.recents is not None,
        "PAGES": call.page_lists is not None,
        "num_warps": NUM_WARPS,
    }
    has_p = {"P_HEADS": call.p_heads is not None}
    bounds = sums = inside = None
    room = columns // CANDIDATES
    if bracket:
        bounds = call.lse.new_empty((rows, 2))
        sums = torch.empty((rows, thresholds.SUMS.value), dtype=torch.int64, device=call.scores.device)
        inside = call.scores.new_empty((rows, room))
        launch(
            thresholds.bracket_kernel,
            rows,
            (*about, call.p_heads, bounds, sums),
            (*strides, call.min_keys, call.p, DEVIATIONS),
            SAMPLE=SAMPLE,
            PIECE=PIECE,
            **has_p,
            **options,
        )
        chunks = triton.cdiv(columns, CHUNK)
        launch(
            thresholds.partition_kernel,
            rows * chunks,
            (*about, bounds, sums, inside),
            (*strides, chunks, room),
            CHUNK=CHUNK,
            **options,
        )
    launch(
        thresholds.threshold_kernel,
        rows,
        (*about, call.p_heads, bounds, sums, inside, threshold),
        (*strides, call.min_keys, room, call.p),
        BRACKET=bracket,
        TILE=TILE,
        **has_p,
        **options,
    )
    return threshold


def _lists(call: SelectionInputs, threshold: Tensor) -> PositionLists:
    batch, heads, columns = call.scores.shape
    rows, chunks = batch * call.kv_heads, triton.cdiv(columns, CHUNK)
    found = PositionLists(
        call.lengths.new_empty((batch, call.kv_heads, call.capacity)),
        *call.lengths.new_empty((2, batch, call.kv_heads)),
    )
    rank = call.scores.new_empty((rows, columns))
    counts = call.lengths.new_empty((rows, chunks, 2))
    level, older = call.lse.new_empty(rows), call.lengths.new_empty(rows)
    pages = call.page_lists is not None
    launch(
        lists.rank_kernel,
        rows * chunks,
        (
            *(call.scores, call.lse, call.lengths, call.recents, call.page_lists, call.page_counts),
            *(threshold, rank, counts),
        ),
        (*call.scores.stride()[:2], *_page_strides(call), columns, call.recent, call.sinks, chunks),
        KV_HEADS=call.kv_heads,
        GROUP=heads // call.kv_heads,
        RECENTS=call.recents is not None,
        PAGES=pages,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )
    padded = triton.next_power_of_2(chunks)
    launch(
        lists.fit_kernel,
        rows,
        (rank, threshold, counts, level, older, found.counts, found.dropped),
        (columns, chunks, call.capacity),
        NEWEST=call.newest,
        CHUNKS_PAD=padded,
        CHUNK=CHUNK,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    launch(
        lists.write_kernel,
        rows * chunks,
        (rank, call.page_lists, counts, level, older, found.lists),
        (*_page_strides(call), columns, chunks, call.capacity),
        KV_HEADS=call.kv_heads,
        PAGES=pages,
        CHUNKS_PAD=padded,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )
    return found


def _page_strides(call: SelectionInputs) -> tuple[int, int]:
    return (0, 0) if call.page_lists is None else (call.page_lists.stride(0), call.page_lists.stride(1))
