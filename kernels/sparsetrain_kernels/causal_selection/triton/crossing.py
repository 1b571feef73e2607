"""Launches the search for crossings. Everything follows from shapes; nothing is read on the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.causal_selection.triton import crossing_kernels as kernels
from sparsetrain_kernels.launching import cdiv, launch, next_power_of_2, on_device

CHUNK, STEP = 1024, 32
"""Rows and points of a coarse cell, up to 2^18 rows, and of a fine one. In smaller cells fewer pairs are compared, but
there are more corners."""
NEVER, BEYOND_ROWS = kernels.NEVER.value, kernels.BEYOND_ROWS.value
WARPS = 4


def find_first_rows(
    arrival: Tensor, point: Tensor | None, entry: Tensor, first_row: Tensor, unit: int, limit: int
) -> None:
    """The first row at which each point is passed: ``f > limit``, as :mod:`.crossing_kernels` defines ``f``.

    Args:
        arrival: ``[heads, rows]``: the place of the key that arrives at a row, int64, or ``NEVER``; without points, its
            number, int32, or -1.
        point: int64 ``[heads, points]``, ascending: the kinks of gates. None: the places of the keys themselves, which
            are the numbers from 0 on.
        entry: int32 ``[heads, points]``: the row at which the key of a point arrives, or ``BEYOND_ROWS``.
        first_row: int32 ``[heads, points]``, where the rows go. What a point that is never passed has there stays.
        unit: what a key adds at most.
        limit: at least 0.
    """
    heads, rows = arrival.shape
    points = entry.shape[1]
    # The corners of longer ones stay fewer than the rows.
    chunk = max(CHUNK, 2 * next_power_of_2(math.isqrt(rows)))
    row_chunks, point_chunks = cdiv(rows, chunk), cdiv(points, chunk)
    diagonals = row_chunks + point_chunks
    kind: dict[str, Any] = {"dtype": arrival.dtype, "device": arrival.device}
    # Of f, and unless it is a count, of its slope and its ties.
    corners = torch.empty((1 if point is None else 3, heads, row_chunks, point_chunks), **kind)
    fine_shape = (heads, diagonals, chunk // STEP, chunk // STEP)
    fine: list[Tensor | None] = [torch.empty(fine_shape, **kind), None, None]
    if point is not None:
        fine[1:] = torch.empty((2, *fine_shape), dtype=torch.int32, device=arrival.device)
    cell = torch.empty((heads, diagonals), dtype=torch.int32, device=arrival.device)
    sizes = (rows, points, row_chunks, point_chunks, unit)
    constants: dict[str, Any] = {"SOFT": point is not None, "CHUNK": chunk, "STEP": STEP, "num_warps": WARPS}
    with on_device(arrival):
        launch(
            kernels.crossing_corners_kernel,
            cdiv(point_chunks, STEP) * row_chunks * heads,
            (arrival, point, *_three(corners)),
            sizes,
            **constants,
        )
        launch(
            kernels.crossing_cells_kernel,
            diagonals * heads,
            (arrival, point, entry, *_three(corners.cumsum(2, dtype=corners.dtype)), cell, *fine),
            (*sizes, limit),
            ROW_CHUNKS=next_power_of_2(row_chunks),
            **constants,
        )
        launch(
            kernels.crossing_rows_kernel,
            2 * (chunk // STEP) * diagonals * heads,
            (arrival, point, entry, cell, *fine, first_row),
            (*sizes, limit),
            **constants,
        )


def _three(corners: Tensor) -> tuple[Tensor | None, ...]:
    return (*corners.unbind(), None, None)[:3]
