"""Where a staircase runs: for every point of an axis, the first row at which enough has arrived beyond it.

At each row of a head at most one key arrives, at place ``A`` on an axis of integers. Of a point ``V``, after row ``t``,

    f_t(V) = sum over the arrived keys of clip(A - V, 0, UNIT),       T(V) = first row t with f_t(V) > limit

As ``f`` grows with ``t`` and falls with ``V``, the points of T, sorted, are a staircase through the plane of rows and
points. It is found on a grid of corners, ``CHUNK`` rows and points apart, then within the cells that it crosses on a
finer grid of ``STEP = CHUNK / STEP``, then row by row: about as many cells as there are chunks of rows and of points,
and never more than one on each antidiagonal.

Within a cell the keys that arrived before it matter only through ``f`` at its corner, its slope there, and the kinks of
``f`` among the cell's own points. ``SOFT``: the points are ``A - UNIT`` (even) and ``A - 1`` (odd, just before ``A``)
of every key, and ``A`` is even. Keys of equal places may lie on both sides of a corner ``A - 1``, so that they are
counted apart, as its ties. Otherwise ``UNIT`` is 1 and the points are the numbers ``A`` themselves. All arithmetic is
in integers of 64 bits, exact, and wraps where intermediate terms cancel.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2**62))
"""The place of no key: it adds nothing anywhere."""
BEYOND = tl.constexpr(2**62)
"""The place of no point."""
BEYOND_ROWS = tl.constexpr(2**31 - 1)


@triton.jit
def crossing_corners_kernel(
    arrival_ptr,
    point_ptr,
    value_ptr,
    slope_ptr,
    ties_ptr,
    rows,
    points,
    row_chunks,
    point_chunks,
    unit,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """What the keys that arrive in each chunk of rows add to ``f``, to its falling slope and to the ties at the first
    point of each chunk: int64 ``[heads, row_chunks, point_chunks]``. Grid: ``STEP`` chunks of points fastest, then
    chunks of rows, then heads."""
    groups = tl.cdiv(point_chunks, STEP)
    chunk = tl.program_id(0) // groups % row_chunks
    head = (tl.program_id(0) // groups // row_chunks).to(tl.int64)
    corner = tl.program_id(0) % groups * STEP + tl.arange(0, STEP)
    is_corner = corner < point_chunks
    point = tl.load(point_ptr + head * points + corner * CHUNK, mask=is_corner, other=0)
    value = tl.zeros([STEP], tl.int64)
    slope = tl.zeros([STEP], tl.int32)
    ties = tl.zeros([STEP], tl.int32)
    arrival_ptr += head * rows
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, rows), STEP):
        row = start + tl.arange(0, STEP)
        arrival = tl.load(arrival_ptr + row, mask=row < rows, other=NEVER)
        gain, falls, tied = _gain(arrival[:, None], point[None, :], unit)
        value += tl.sum(gain, 0)
        slope += tl.sum(falls, 0)
        ties += tl.sum(tied, 0)
    place = (head * row_chunks + chunk) * point_chunks + corner
    tl.store(value_ptr + place, value, mask=is_corner)
    tl.store(slope_ptr + place, slope, mask=is_corner)
    tl.store(ties_ptr + place, ties, mask=is_corner)


@triton.jit
def crossing_cells_kernel(
    arrival_ptr,
    point_ptr,
    entry_ptr,
    value_ptr,
    slope_ptr,
    ties_ptr,
    cell_ptr,
    fine_value_ptr,
    fine_slope_ptr,
    fine_ties_ptr,
    rows,
    points,
    row_chunks,
    point_chunks,
    unit,
    limit,
    ROW_CHUNKS: tl.constexpr,
    SOFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The coarse cell that the staircase crosses on each antidiagonal, int32 ``cell [heads, antidiagonals]`` (the chunk
    of rows, -1 if there is none), and ``f`` (int64), its slope and its ties (int32) on the fine grid within it, before
    each fine chunk of rows and at the first of each fine chunk of points: ``[heads, antidiagonals, STEP, STEP]``.

    ``value``, ``slope`` and ``ties`` are running sums over the chunks of rows. Grid: antidiagonals fastest, then heads.
    """
    diagonals = row_chunks + point_chunks
    diagonal = tl.program_id(0) % diagonals
    head = (tl.program_id(0) // diagonals).to(tl.int64)
    value_ptr += head * row_chunks * point_chunks
    slope_ptr += head * row_chunks * point_chunks
    ties_ptr += head * row_chunks * point_chunks
    lane = tl.arange(0, ROW_CHUNKS)
    column = diagonal - lane
    inside = (lane < row_chunks) & (column >= 0) & (column < point_chunks)
    # At the chunk's last row its first point has been passed; before its first row, not yet the next chunk's.
    after = tl.load(value_ptr + lane * point_chunks + column, mask=inside, other=0)
    has_next = inside & (lane > 0) & (column + 1 < point_chunks)
    before = tl.load(value_ptr + (lane - 1) * point_chunks + column + 1, mask=has_next, other=0)
    crossed = inside & (after > limit) & (before <= limit)
    chunk = tl.max(tl.where(crossed, lane, -1))
    cell = head * diagonals + diagonal
    tl.store(cell_ptr + cell, chunk)
    if chunk < 0:
        return
    column = diagonal - chunk
    step = tl.arange(0, STEP)
    index = column * CHUNK + step * STEP
    arrival_ptr += head * rows
    point_ptr += head * points
    entry_ptr += head * points
    point = tl.load(point_ptr + index, mask=index < points, other=BEYOND)
    corner = tl.load(point_ptr + column * CHUNK)
    earlier = (chunk - 1) * point_chunks + column
    value = tl.load(value_ptr + earlier, mask=chunk > 0, other=0)
    slope = tl.load(slope_ptr + earlier, mask=chunk > 0, other=0).to(tl.int32)
    corner_ties = tl.load(ties_ptr + earlier, mask=chunk > 0, other=0).to(tl.int32)
    value, slope, ties = _move(
        point_ptr,
        entry_ptr,
        column * CHUNK,
        CHUNK,
        chunk * CHUNK,
        points,
        corner,
        value,
        slope,
        corner_ties,
        point,
        SOFT,
        STEP,
    )
    # Equal points may go on in the next chunk.
    next_chunk = column + 1 < point_chunks
    next_corner = tl.load(point_ptr + column * CHUNK + CHUNK, mask=next_chunk, other=BEYOND)
    next_ties = tl.load(ties_ptr + earlier + 1, mask=next_chunk & (chunk > 0), other=0).to(tl.int32)
    ties = tl.where(point == next_corner, next_ties, ties)
    # No staircase runs through columns that are not there.
    value = tl.where(index < points, value, NEVER)
    fine_value_ptr += cell * (STEP * STEP) + step
    fine_slope_ptr += cell * (STEP * STEP) + step
    fine_ties_ptr += cell * (STEP * STEP) + step
    for i in range(0, STEP):
        tl.store(fine_value_ptr + i * STEP, value)
        tl.store(fine_slope_ptr + i * STEP, slope)
        tl.store(fine_ties_ptr + i * STEP, ties)
        row = chunk * CHUNK + i * STEP + step
        arrival = tl.load(arrival_ptr + row, mask=row < rows, other=NEVER)
        gain, falls, tied = _gain(arrival[:, None], point[None, :], unit)
        value += tl.sum(gain, 0)
        slope += tl.sum(falls, 0)
        ties += tl.sum(tied, 0)


@triton.jit
def crossing_rows_kernel(
    arrival_ptr,
    point_ptr,
    entry_ptr,
    cell_ptr,
    fine_value_ptr,
    fine_slope_ptr,
    fine_ties_ptr,
    first_row_ptr,
    rows,
    points,
    row_chunks,
    point_chunks,
    unit,
    limit,
    SOFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """``T`` of the points in the fine cell that the staircase crosses on each antidiagonal of each coarse cell, int32
    ``[heads, points]``. Points that are never passed keep what is there. Grid: fine antidiagonals fastest, then coarse
    ones, then heads."""
    diagonals = row_chunks + point_chunks
    fine = tl.program_id(0) % (2 * STEP)
    cell = (tl.program_id(0) // (2 * STEP)).to(tl.int64)
    head = cell // diagonals
    chunk = tl.load(cell_ptr + cell)
    if chunk < 0:
        return
    column = (cell % diagonals).to(tl.int32) - chunk
    fine_value_ptr += cell * (STEP * STEP)
    fine_slope_ptr += cell * (STEP * STEP)
    fine_ties_ptr += cell * (STEP * STEP)
    lane = tl.arange(0, STEP)
    place = fine - lane
    inside = (place >= 0) & (place < STEP)
    # Behind the last fine chunk of rows nothing is known here: it counts as passed.
    has_after = inside & (lane + 1 < STEP)
    after = tl.load(fine_value_ptr + (lane + 1) * STEP + place, mask=has_after, other=limit + 1)
    has_next = inside & (place + 1 < STEP)
    before = tl.load(fine_value_ptr + lane * STEP + place + 1, mask=has_next, other=limit)
    crossed = inside & (after > limit) & (before <= limit)
    i = tl.max(tl.where(crossed, lane, -1))
    if i < 0:
        return
    k = fine - i
    arrival_ptr += head * rows
    point_ptr += head * points
    entry_ptr += head * points
    start = column * CHUNK + k * STEP
    if start >= points:
        return
    index = start + lane
    point = tl.load(point_ptr + index, mask=index < points, other=BEYOND)
    corner = tl.load(point_ptr + start)
    value = tl.load(fine_value_ptr + i * STEP + k)
    slope = tl.load(fine_slope_ptr + i * STEP + k)
    ties = tl.load(fine_ties_ptr + i * STEP + k)
    first_row = chunk * CHUNK + i * STEP
    # Keys that arrived before the fine cell's first row.
    value, _, _ = _move(
        point_ptr, entry_ptr, start, STEP, first_row, points, corner, value, slope, ties, point, SOFT, STEP
    )
    row = first_row + lane
    arrival = tl.load(arrival_ptr + row, mask=row < rows, other=NEVER)
    gain, _, _ = _gain(arrival[:, None], point[None, :], unit)
    short = (value[None, :] + tl.cumsum(gain, 0)) <= limit
    count = tl.sum((short & (row < rows)[:, None]).to(tl.int32), 0)
    here = (value <= limit) & (count < tl.minimum(rows - first_row, STEP)) & (index < points)
    tl.store(first_row_ptr + head * points + index, first_row + count, mask=here)


@triton.jit
def _gain(arrival, point, unit):
    """What a key adds to ``f`` at a point, whether it falls there to the right, and whether it is tied with it."""
    ahead = arrival - point
    falls = ((ahead > 0) & (ahead <= unit)).to(tl.int32)
    return tl.minimum(tl.maximum(ahead, 0), unit), falls, (ahead == 1).to(tl.int32)


@triton.jit
def _move(
    point_ptr,
    entry_ptr,
    start,
    count,
    first_row,
    points,
    corner,
    value,
    slope,
    ties,
    point,
    SOFT: tl.constexpr,
    STEP: tl.constexpr,
):
    """``f`` of the keys that arrived before ``first_row``, its slope and its ties, at ``point [STEP]``, from those at
    ``corner``, by the ``count`` points from ``start`` on."""
    if SOFT:
        # The ties are gone one step behind the corner.
        behind = tl.maximum(point - corner - 1, 0)
        moved = value - slope.to(tl.int64) * (point - corner) + ties.to(tl.int64) * behind
        slopes = tl.where(point > corner, slope - ties, slope)
    else:
        moved = tl.zeros([STEP], tl.int64) + value
        slopes = tl.zeros([STEP], tl.int32)
    tied = tl.zeros([STEP], tl.int32)
    for base in range(start, tl.minimum(start + count, points), STEP):
        index = base + tl.arange(0, STEP)
        inside = index < points
        kink = tl.load(point_ptr + index, mask=inside, other=BEYOND)
        is_old = tl.load(entry_ptr + index, mask=inside, other=BEYOND_ROWS) < first_row
        if SOFT:
            tied += tl.sum((is_old[:, None] & (kink[:, None] == point[None, :])).to(tl.int32), 0)
            is_behind = is_old & (kink > corner)
            ends = kink & 1
            kink = kink + ends
            passed = is_behind[:, None] & (kink[:, None] <= point[None, :])
            sign = tl.where(passed, (2 * ends - 1)[:, None], 0)
            moved += tl.sum(sign * (point[None, :] - kink[:, None]), 0)
            slopes -= tl.sum(sign.to(tl.int32), 0)
        else:
            passed = (is_old & (kink > corner))[:, None] & (kink[:, None] <= point[None, :])
            moved -= tl.sum(passed.to(tl.int64), 0)
    tied = tl.where(point == corner, ties, tl.where((point & 1) == 1, tied, 0))
    return moved, slopes, tied
