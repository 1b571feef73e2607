"""Launches the kernels of a selection. Everything follows from shapes; no tensor is read on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.inputs import consecutive_rows
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device
from sparsetrain_kernels.top_p_selection.selection import PositionLists, SelectionInputs
from sparsetrain_kernels.top_p_selection.triton import lists, pooling, short, thresholds
from sparsetrain_kernels.top_p_selection.triton.configs import (
    APART,
    CHUNK,
    DEVIATIONS,
    FEW,
    GATHER,
    GUESS_WARPS,
    GUESSES,
    LARGE_SAMPLE,
    NUM_WARPS,
    PIECE,
    REGISTERS,
    SAMPLE,
    SAMPLED,
    SHORT,
    SHORT_COLUMNS,
    SHORT_REGISTERS,
    SIFT,
    SIFT_WARPS,
    SOME,
    TILE,
    TURNS,
)


def select(call: SelectionInputs, into: PositionLists) -> None:
    """As :func:`sparsetrain_kernels.top_p_selection.reference.select`."""
    with on_device(call.scores):
        call = _with_consecutive_rows(call)
        is_short = call.scores.shape[2] <= SHORT
        if call.group != "union" and not (is_short and call.newest and call.width == 1):
            call = _pooled(call)
        (_short_lists if is_short else _lists)(call, into)


def _with_consecutive_rows(call: SelectionInputs) -> SelectionInputs:
    return call._replace(
        scores=consecutive_rows(call.scores),
        lse=None if call.lse is None else call.lse.contiguous(),
        lengths=call.lengths.contiguous(),
        page_lists=None if call.page_lists is None else consecutive_rows(call.page_lists),
        page_counts=None if call.page_counts is None else call.page_counts.contiguous(),
        p_heads=None if call.p_heads is None else call.p_heads.contiguous(),
        recents=None if call.recents is None else call.recents.contiguous(),
        due=None if call.due is None else call.due.contiguous().view(torch.uint8),
    )


def _pooled(call: SelectionInputs) -> SelectionInputs:
    """The same selection from one row of log weights a KV head."""
    batch, heads, columns = call.scores.shape
    chunks = cdiv(columns, CHUNK)
    programs = batch * call.kv_heads * chunks
    pooled = call.scores.new_empty((batch, call.kv_heads, columns))
    launch(
        pooling.pool_heads_kernel,
        programs,
        (call.scores, call.lse, call.lengths, call.page_lists, call.page_counts, call.due, pooled),
        (*call.scores.stride()[:2], *_page_strides(call), columns, chunks),
        KV_HEADS=call.kv_heads,
        GROUP=heads // call.kv_heads,
        MEAN=call.group == "mean",
        PAGES=call.page_lists is not None,
        DUE=call.due is not None,
        LSE=call.lse is not None,
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
    lse = None if call.newest else pooled.float().logsumexp(-1)
    return call._replace(scores=pooled, lse=lse, p_heads=p_heads, group="union", width=1)


def _arguments(call: SelectionInputs) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, numbers and constants that all kernels after the pooling take."""
    row = (call.scores, call.lse, call.lengths, call.recents, call.page_lists, call.page_counts, call.due)
    numbers = (*call.scores.stride()[:2], *_page_strides(call), call.scores.shape[2], call.recent, call.sinks)
    alike = {"KV_HEADS": call.kv_heads, "RECENTS": call.recents is not None, "PAGES": call.page_lists is not None}
    return row, numbers, {**alike, "DUE": call.due is not None}


def _short_lists(call: SelectionInputs, into: PositionLists) -> None:
    """Of rows that a program holds in registers: a launch for the thresholds of a group's heads, and one for the lists;
    or one in all, where a list is of one row."""
    batch, heads, columns = call.scores.shape
    row, numbers, alike = _arguments(call)
    held = max(16, next_power_of_2(columns))
    alike |= {"ROW": held, "P_HEADS": call.p_heads is not None, "num_warps": min(16, max(4, held // SHORT_COLUMNS))}
    pooled, alone = call.group != "union", heads == call.kv_heads
    threshold: Tensor | None = None
    if not (pooled or alone):
        threshold = torch.empty((batch, heads), dtype=torch.int32, device=call.scores.device)
        launch(
            short.short_threshold_kernel,
            batch * heads,
            (*row, call.p_heads, threshold),
            (*numbers, call.min_keys, call.p),
            HEADS=heads,
            **_at_most(SHORT_REGISTERS),
            **alike,
        )
    launch(
        short.short_list_kernel,
        batch * call.kv_heads,
        (*row, call.p_heads, threshold, *into),
        (*numbers, call.min_keys, call.p, call.capacity),
        GROUP=heads // call.kv_heads,
        LSE=call.lse is not None,
        POOLED=pooled,
        SEARCH=threshold is None,
        NEWEST=call.newest,
        **alike,
    )


def _lists(call: SelectionInputs, into: PositionLists) -> None:
    """Of long rows: a floor, the candidates above it, the thresholds and the lists among these, a launch each."""
    batch, heads, columns = call.scores.shape
    rows, group = batch * call.kv_heads, heads // call.kv_heads
    device = call.scores.device
    if call.lse is None:
        call = call._replace(lse=torch.zeros((batch, heads), device=device))
    floor, threshold = torch.empty((2, batch, heads), dtype=torch.int32, device=device)
    taken = torch.empty((rows, APART), dtype=torch.int32, device=device)
    chunks = cdiv(columns, SIFT)
    always: Tensor | None = None
    if call.page_lists is not None:
        always = torch.empty((batch, heads, chunks), dtype=torch.int64, device=device)
    segments = torch.empty((rows, chunks, 2), dtype=torch.int32, device=device)
    # Room for all keys, of which few are candidates: no more of it is touched.
    candidates = torch.empty((rows, columns), dtype=torch.int32, device=device)
    sifted, own = torch.empty((2, batch, heads, columns), dtype=torch.float16, device=device)
    rank = torch.empty((rows, columns), dtype=torch.float16, device=device)
    before = torch.empty((rows, call.newest + 1, columns), dtype=torch.int32, device=device)

    row, numbers, alike = _arguments(call)
    alike["APART"] = APART
    heads_alike = {"HEADS": heads, "P_HEADS": call.p_heads is not None, **alike}
    whole = {"CHUNK": SIFT, "CHUNKS_PAD": max(16, next_power_of_2(chunks)), "GATHER": GATHER, "TILE": TILE}
    whole |= {"FEW": FEW, "SOME": SOME}
    launch(
        thresholds.guess_kernel,
        batch * heads,
        (*row, call.p_heads, floor, taken),
        (*numbers, call.min_keys, call.p, DEVIATIONS),
        SAMPLE=min(max(next_power_of_2(columns // SAMPLED), SAMPLE), LARGE_SAMPLE),
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
        **_at_most(REGISTERS),
        **heads_alike,
        **whole,
    )
    launch(
        lists.list_kernel,
        rows,
        (*row, floor, threshold, taken, segments, candidates, sifted, rank, before, *into),
        (*numbers, chunks, call.capacity),
        GROUP=group,
        NEWEST=call.newest,
        num_warps=NUM_WARPS,
        **alike,
        **whole,
    )


def _at_most(registers: int) -> dict[str, int]:
    """The option of NVIDIA's compiler that bounds the registers of a thread."""
    return {"maxnreg": registers} if registers and torch.version.hip is None else {}


def _page_strides(call: SelectionInputs) -> tuple[int, int]:
    return (0, 0) if call.page_lists is None else (call.page_lists.stride(0), call.page_lists.stride(1))
