"""Launches the kernels of a selection. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

import torch
import triton

from sparsetrain_kernels.inputs import consecutive_rows, row_major
from sparsetrain_kernels.launching import launch, on_device
from sparsetrain_kernels.top_p_selection.selection import PositionLists, SelectionInputs
from sparsetrain_kernels.top_p_selection.triton import lists, pooling, thresholds
from sparsetrain_kernels.top_p_selection.triton.configs import (
    CHUNK,
    DEVIATIONS,
    GATHER,
    GUESS_WARPS,
    GUESSES,
    NUM_WARPS,
    PIECE,
    SAMPLE,
    SIFT,
    SIFT_WARPS,
    TILE,
    TURNS,
)


def select(call: SelectionInputs, into: PositionLists) -> None:
    """As :func:`sparsetrain_kernels.top_p_selection.reference.select`."""
    with on_device(call.scores):
        call = _with_consecutive_rows(call)
        if call.group != "union":
            call = _pooled(call)
        _lists(call, into)


def _with_consecutive_rows(call: SelectionInputs) -> SelectionInputs:
    lse, lengths = row_major(call.lse, call.lengths)
    if call.due is not None:
        # Without tokens there is nothing to do, in any kernel.
        lengths = lengths.where(call.due, 0)
    return call._replace(
        scores=consecutive_rows(call.scores),
        lse=lse,
        lengths=lengths,
        page_lists=None if call.page_lists is None else consecutive_rows(call.page_lists),
        page_counts=None if call.page_counts is None else call.page_counts.contiguous(),
        p_heads=None if call.p_heads is None else call.p_heads.contiguous(),
        recents=None if call.recents is None else call.recents.contiguous(),
        due=None if call.due is None else call.due.contiguous().view(torch.uint8),
    )


def _pooled(call: SelectionInputs) -> SelectionInputs:
    """The same selection from one row of log weights a KV head."""
    batch, heads, columns = call.scores.shape
    chunks = triton.cdiv(columns, CHUNK)
    programs = batch * call.kv_heads * chunks
    pooled = call.scores.new_empty((batch, call.kv_heads, columns))
    launch(
        pooling.pool_heads_kernel,
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
            pooling.pool_neighbours_kernel,
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
    # Of the k heaviest keys, whose weights need not sum to 1, the rank is the pooled logarithm itself.
    lse = call.lse.new_zeros((batch, call.kv_heads)) if call.newest else pooled.float().logsumexp(-1)
    return call._replace(scores=pooled, lse=lse, p_heads=p_heads, group="union", width=1)


def _lists(call: SelectionInputs, into: PositionLists) -> None:
    batch, heads, columns = call.scores.shape
    rows, group = batch * call.kv_heads, heads // call.kv_heads
    device = call.scores.device
    floor, threshold = torch.empty((2, batch, heads), dtype=torch.int32, device=device)
    taken = torch.empty((batch, call.kv_heads), dtype=torch.int32, device=device)
    chunks = triton.cdiv(columns, SIFT)
    always = torch.empty((batch, heads, chunks), dtype=torch.int64, device=device)
    segments = torch.empty((rows, chunks, 2), dtype=torch.int32, device=device)
    # Room for all keys, of which few are candidates: no more of it is touched.
    candidates = torch.empty((rows, columns), dtype=torch.int32, device=device)
    sifted, own = torch.empty((2, batch, heads, columns), dtype=torch.float16, device=device)
    rank = torch.empty((rows, columns), dtype=torch.float16, device=device)
    before = torch.empty((rows, call.newest + 1, columns), dtype=torch.int32, device=device)

    row = (call.scores, call.lse, call.lengths, call.recents, call.page_lists, call.page_counts)
    numbers = (*call.scores.stride()[:2], *_page_strides(call), columns, call.recent, call.sinks)
    alike = {"KV_HEADS": call.kv_heads, "RECENTS": call.recents is not None, "PAGES": call.page_lists is not None}
    heads_alike = {"HEADS": heads, "P_HEADS": call.p_heads is not None, **alike}
    whole = {"CHUNK": SIFT, "CHUNKS_PAD": max(16, triton.next_power_of_2(chunks)), "GATHER": GATHER, "TILE": TILE}
    launch(
        thresholds.guess_kernel,
        batch * heads,
        (*row, call.p_heads, floor, taken),
        (*numbers, call.min_keys, call.p, DEVIATIONS),
        SAMPLE=SAMPLE,
        PIECE=PIECE,
        GUESSES=GUESSES,
        TURNS=TURNS,
        num_warps=GUESS_WARPS,
        **heads_alike,
    )
    launch(
        thresholds.sift_kernel,
        rows * chunks,
        (*row, floor, taken, always, segments, candidates),
        (*numbers, chunks),
        GROUP=group,
        CHUNK=SIFT,
        num_warps=SIFT_WARPS,
        **alike,
    )
    launch(
        thresholds.threshold_kernel,
        batch * heads,
        (*row, call.p_heads, floor, taken, always, candidates, sifted, own, threshold),
        (*numbers, chunks, call.min_keys, call.p),
        num_warps=NUM_WARPS,
        **heads_alike,
        **whole,
    )
    launch(
        lists.list_kernel,
        rows,
        (*row, floor, threshold, taken, segments, candidates, sifted, rank, before, call.due, *into),
        (*numbers, chunks, call.capacity),
        GROUP=group,
        NEWEST=call.newest,
        DUE=call.due is not None,
        num_warps=NUM_WARPS,
        **alike,
        **whole,
    )


def _page_strides(call: SelectionInputs) -> tuple[int, int]:
    return (0, 0) if call.page_lists is None else (call.page_lists.stride(0), call.page_lists.stride(1))
