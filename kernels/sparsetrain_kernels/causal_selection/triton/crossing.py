"""Launches the search for crossings. Everything follows from shapes; nothing is read on the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.causal_selection.triton import crossing_kernels as kernels
from sparsetrain_kernels.launching import launch, on_device

SHORT = 2**14
"""Rows up to which a small grid is faster: fewer steps one after the other, at more corners."""
STEPS = (32, 64)
"""Rows and points of a fine cell, and fine cells in a coarse one, up to ``SHORT`` rows and for more."""
NEVER, BEYOND_ROWS = kernels.NEVER.value, kernels.BEYOND_ROWS.value
WARPS = 8


def find_first_rows(
    arrival: Tensor, point: Tensor, entry: Tensor, first_row: Tensor, unit: int, limit: int, *, soft: bool
) -> None:
    """The first row at which each point is passed: ``f > limit``, as :mod:`.crossing_kernels` defines ``f``.

    Args:
        arrival: int64 ``[heads, rows]``: the place of the key that arrives at a row, or ``NEVER``.
        point: int64 ``[heads, points]``, ascending.
        entry: int32 ``[heads, points]``: the row at which the key of a point arrives, or ``BEYOND_ROWS``.
        first_row: int32 ``[heads, points]``, where the rows go. What a point that is never passed has there stays.
        unit: what a key adds at most.
        limit: at least 0.
        soft: whether the points are the kinks of gates, or the places of the keys themselves (with ``unit`` 1).
    """
    heads, rows = arrival.shape
    points = point.shape[1]
    step = STEPS[rows > SHORT]
    chunk = step * step
    row_chunks, point_chunks = triton.cdiv(rows, chunk), triton.cdiv(points, chunk)
    diagonals = row_chunks + point_chunks
    device = arrival.device
    corners = torch.empty((3, heads, row_chunks, point_chunks), dtype=torch.int64, device=device)
    cell = torch.empty((heads, diagonals), dtype=torch.int32, device=device)
    fine_value = torch.empty((heads, diagonals, step, step), dtype=torch.int64, device=device)
    fine_slope, fine_ties = torch.empty((2, heads, diagonals, step, step), dtype=torch.int32, device=device).unbind()
    sizes = (rows, points, row_chunks, point_chunks, unit)
    grids = {"CHUNK": chunk, "STEP": step}
    with on_device(arrival):
        launch(
            kernels.crossing_corners_kernel,
            triton.cdiv(point_chunks, step) * row_chunks * heads,
            (arrival, point, *corners.unbind()),
            sizes,
            **grids,
            num_warps=WARPS,
        )
        launch(
            kernels.crossing_cells_kernel,
            diagonals * heads,
            (arrival, point, entry, *corners.cumsum(2).unbind(), cell, fine_value, fine_slope, fine_ties),
            (*sizes, limit),
            ROW_CHUNKS=triton.next_power_of_2(row_chunks),
            SOFT=soft,
            **grids,
            num_warps=WARPS,
        )
        launch(
            kernels.crossing_rows_kernel,
            2 * step * diagonals * heads,
            (arrival, point, entry, cell, fine_value, fine_slope, fine_ties, first_row),
            (*sizes, limit),
            SOFT=soft,
            **grids,
            num_warps=WARPS,
        )
