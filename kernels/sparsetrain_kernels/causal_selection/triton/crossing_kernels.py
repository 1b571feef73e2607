"""Where a staircase runs: for every point of an axis, the first row at which enough has arrived beyond it.

At each row of a head at most one key arrives, at place ``A`` on an axis of integers. Of a point ``V``, after row ``t``,

    f_t(V) = sum over the arrived keys of clip(A - V, 0, UNIT),       T(V) = first row t with f_t(V) > limit

As ``f`` grows with ``t`` and falls with ``V``, the points of T, sorted, are a staircase through the plane of rows and
points. It is found on a grid of corners, ``CHUNK`` rows and points apart, then within the cells that it crosses on a
finer grid of ``STEP``, then row by row: about as many cells as there are chunks of rows and of points, and never more
than one on each antidiagonal.

Within a cell the keys that arrived before it matter only through ``f`` at its corner, its slope there, and the kinks of
``f`` among the cell's own points. ``SOFT``: the points are ``A - UNIT`` (even) and ``A - 1`` (odd, just before ``A``)
of every key, and ``A`` is even. Keys of equal places may lie on both sides of a corner ``A - 1``, so that they are
counted apart, as its ties. All arithmetic is in integers of 64 bits, exact, and wraps where intermediate terms cancel.

Otherwise ``UNIT`` is 1 and the points are the numbers from 0 on, each the place of one key: ``f`` is a count of 32
bits, and falls by one behind each key that has arrived. There are no tensors of points, slopes and ties then.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2**62))
"""The place of no key: it adds nothing anywhere. Unless ``SOFT``, this is -1."""
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
    SOFT: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """What the keys that arrive in each chunk of rows add to ``f``, to its falling slope and to the ties at the first
    point of each chunk: ``[heads, row_chunks, point_chunks]``. Grid: ``STEP`` chunks of points fastest, then chunks of
    rows, then heads."""
    groups = tl.cdiv(point_chunks, STEP)
    chunk = tl.program_id(0) // groups % row_chunks
    head = (tl.program_id(0) // groups // row_chunks).to(tl.int64)
    corner = tl.program_id(0) % groups * STEP + tl.arange(0, STEP)
    is_corner = corner < point_chunks
    if SOFT:
        point_ptr += head * points
    point = _points(point_ptr, corner * CHUNK, points, SOFT)
    # Summed over their rows at the end: a sum across threads in every step takes longer than the rest of it.
    value = tl.zeros([STEP, STEP], tl.int64 if SOFT else tl.int32)
    slope = tl.zeros([STEP, STEP], tl.int32)
    ties = tl.zeros([STEP, STEP], tl.int32)
    arrival_ptr += head * rows
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, rows), STEP):
        arrival = _arrivals(arrival_ptr, start + tl.arange(0, STEP), rows, SOFT)
        value += _gain(arrival, point, unit, SOFT)
        if SOFT:
            falls, tied = _falls(arrival, point, unit)
            slope += falls
            ties += tied
    place = (head * row_chunks + chunk) * point_chunks + corner
    tl.store(value_ptr + place, tl.sum(value, 0), mask=is_corner)
    if SOFT:
        tl.store(slope_ptr + place, tl.sum(slope, 0), mask=is_corner)
        tl.store(ties_ptr + place, tl.sum(ties, 0), mask=is_corner)


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
    of rows, -1 if there is none), and ``f``, its slope and its ties (int32) on the fine grid within it, before each
    fine chunk of rows and at the first of each fine chunk of points: ``[heads, antidiagonals, FINE, FINE]``.

    ``value``, ``slope`` and ``ties`` are running sums over the chunks of rows. Grid: antidiagonals fastest, then heads.
    """
    FINE: tl.constexpr = CHUNK // STEP
    diagonals = row_chunks + point_chunks
    diagonal = tl.program_id(0) % diagonals
    head = (tl.program_id(0) // diagonals).to(tl.int64)
    corners = head * row_chunks * point_chunks
    value_ptr += corners
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
    fine = tl.arange(0, FINE)
    first_point, first_row = column * CHUNK, chunk * CHUNK
    index = first_point + fine * STEP
    arrival_ptr += head * rows
    entry_ptr += head * points
    if SOFT:
        point_ptr += head * points
    point = _points(point_ptr, index, points, SOFT)
    earlier = (chunk - 1) * point_chunks + column
    value = tl.load(value_ptr + earlier, mask=chunk > 0, other=0)
    if SOFT:
        slope_ptr += corners + earlier
        ties_ptr += corners + earlier
        slope = tl.load(slope_ptr, mask=chunk > 0, other=0).to(tl.int32)
        corner_ties = tl.load(ties_ptr, mask=chunk > 0, other=0).to(tl.int32)
        value, slope, ties = _move(
            point_ptr, entry_ptr, first_point, CHUNK, first_row, points, value, slope, corner_ties, point, STEP
        )
        # Equal points may go on in the next chunk.
        next_chunk = column + 1 < point_chunks
        next_corner = tl.load(point_ptr + first_point + CHUNK, mask=next_chunk, other=BEYOND)
        next_ties = tl.load(ties_ptr + 1, mask=next_chunk & (chunk > 0), other=0).to(tl.int32)
        ties = tl.where(point == next_corner, next_ties, ties)
    else:
        behind = index[:, None] + 1 + tl.arange(0, STEP)[None, :]
        old = tl.sum(_is_old(entry_ptr, behind, first_row, points), 1)
        value += old - tl.cumsum(old, 0)
    # No staircase runs through columns that are not there.
    value = tl.where(index < points, value, NEVER if SOFT else -1)
    place = cell * (FINE * FINE) + fine
    for i in range(0, FINE):
        tl.store(fine_value_ptr + place, value)
        arrival = _arrivals(arrival_ptr, first_row + i * STEP + tl.arange(0, STEP), rows, SOFT)
        value += tl.sum(_gain(arrival, point, unit, SOFT), 0)
        if SOFT:
            tl.store(fine_slope_ptr + place, slope)
            tl.store(fine_ties_ptr + place, ties)
            falls, tied = _falls(arrival, point, unit)
            slope += tl.sum(falls, 0)
            ties += tl.sum(tied, 0)
        place += FINE


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
    FINE: tl.constexpr = CHUNK // STEP
    diagonals = row_chunks + point_chunks
    fine = tl.program_id(0) % (2 * FINE)
    cell = (tl.program_id(0) // (2 * FINE)).to(tl.int64)
    head = cell // diagonals
    chunk = tl.load(cell_ptr + cell)
    if chunk < 0:
        return
    column = (cell % diagonals).to(tl.int32) - chunk
    fine_value_ptr += cell * (FINE * FINE)
    lane = tl.arange(0, FINE)
    place = fine - lane
    inside = (place >= 0) & (place < FINE)
    # Behind the last fine chunk of rows nothing is known here: it counts as passed.
    has_after = inside & (lane + 1 < FINE)
    after = tl.load(fine_value_ptr + (lane + 1) * FINE + place, mask=has_after, other=limit + 1)
    has_next = inside & (place + 1 < FINE)
    before = tl.load(fine_value_ptr + lane * FINE + place + 1, mask=has_next, other=limit)
    crossed = inside & (after > limit) & (before <= limit)
    i = tl.max(tl.where(crossed, lane, -1))
    if i < 0:
        return
    k = fine - i
    start = column * CHUNK + k * STEP
    if start >= points:
        return
    arrival_ptr += head * rows
    entry_ptr += head * points
    if SOFT:
        point_ptr += head * points
    lane = tl.arange(0, STEP)
    index = start + lane
    point = _points(point_ptr, index, points, SOFT)
    value = tl.load(fine_value_ptr + i * FINE + k)
    first_row = chunk * CHUNK + i * STEP
    # Keys that arrived before the fine cell's first row.
    if SOFT:
        slope = tl.load(fine_slope_ptr + cell * (FINE * FINE) + i * FINE + k)
        ties = tl.load(fine_ties_ptr + cell * (FINE * FINE) + i * FINE + k)
        value, _, _ = _move(point_ptr, entry_ptr, start, STEP, first_row, points, value, slope, ties, point, STEP)
    else:
        old = tl.where(lane > 0, _is_old(entry_ptr, index, first_row, points), 0)
        value -= tl.cumsum(old, 0)
    row = first_row + lane
    arrival = _arrivals(arrival_ptr, row, rows, SOFT)
    short = (value[None, :] + tl.cumsum(_gain(arrival, point, unit, SOFT), 0)) <= limit
    count = tl.sum((short & (row < rows)[:, None]).to(tl.int32), 0)
    here = (value <= limit) & (count < tl.minimum(rows - first_row, STEP)) & (index < points)
    tl.store(first_row_ptr + head * points + index, first_row + count, mask=here)


@triton.jit
def _points(point_ptr, index, points, SOFT: tl.constexpr):
    if SOFT:
        return tl.load(point_ptr + index, mask=index < points, other=BEYOND)
    else:
        return index


@triton.jit
def _arrivals(arrival_ptr, row, rows, SOFT: tl.constexpr):
    return tl.load(arrival_ptr + row, mask=row < rows, other=NEVER if SOFT else -1)


@triton.jit
def _is_old(entry_ptr, index, first_row, points):
    """Whether the key of a point arrived before ``first_row``, int32."""
    return (tl.load(entry_ptr + index, mask=index < points, other=BEYOND_ROWS) < first_row).to(tl.int32)


@triton.jit
def _gain(arrival, point, unit, SOFT: tl.constexpr):
    """What each key that arrives adds to ``f`` at each point, ``[rows, points]``."""
    if SOFT:
        return tl.minimum(tl.maximum(arrival[:, None] - point[None, :], 0), unit)
    else:
        return (arrival[:, None] > point[None, :]).to(tl.int32)


@triton.jit
def _falls(arrival, point, unit):
    """Whether it falls there to the right, and whether it is tied with the point."""
    ahead = arrival[:, None] - point[None, :]
    return ((ahead > 0) & (ahead <= unit)).to(tl.int32), (ahead == 1).to(tl.int32)


@triton.jit
def _move(point_ptr, entry_ptr, start, count, first_row, points, value, slope, ties, point, STEP: tl.constexpr):
    """``f`` of the keys that arrived before ``first_row``, its slope and its ties, at the points ``point``, from those
    at the point ``start``, by the ``count`` points from there on."""
    corner = tl.load(point_ptr + start)
    # The ties are gone one step behind the corner.
    behind = tl.maximum(point - corner - 1, 0)
    value = value - slope.to(tl.int64) * (point - corner) + ties.to(tl.int64) * behind
    slope = tl.where(point > corner, slope - ties, slope)
    # Of the kinks that a point has passed, the number of those where f falls less minus that of those where it falls
    # more, and the sum of their places with these signs. Summed over kinks at the end, as for the corners.
    turns = tl.zeros([STEP, point.shape[0]], tl.int32)
    places = tl.zeros([STEP, point.shape[0]], tl.int64)
    tied = tl.zeros([STEP, point.shape[0]], tl.int32)
    for base in range(start, tl.minimum(start + count, points), STEP):
        index = base + tl.arange(0, STEP)
        kink = tl.load(point_ptr + index, mask=index < points, other=BEYOND)
        is_old = _is_old(entry_ptr, index, first_row, points) > 0
        # What no point reaches: all others.
        old = tl.where(is_old, kink, BEYOND + 1)
        tied += (old[:, None] == point[None, :]).to(tl.int32)
        ends = (kink & 1).to(tl.int32)
        turn = tl.where(is_old & (kink > corner), kink + ends, BEYOND + 1)
        passed = turn[:, None] <= point[None, :]
        sign = 2 * ends - 1
        turns += tl.where(passed, sign[:, None], 0)
        places += tl.where(passed, (sign * turn)[:, None], 0)
    turned = tl.sum(turns, 0)
    value += turned * point - tl.sum(places, 0)
    ties = tl.where(point == corner, ties, tl.where((point & 1) == 1, tl.sum(tied, 0), 0))
    return value, slope - turned, ties
