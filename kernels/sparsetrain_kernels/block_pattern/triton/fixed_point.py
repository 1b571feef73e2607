"""The gradient of queries as a sum of integers, which has the same bits in whatever order its parts arrive.

Row ``i`` of it is ``scale`` times the sum over keys of ``dS_ij K_j``, with ``dS_ij = P_ij (dO_i V_j - delta_i)``.
Weights add up to at most 1, so that no part of that sum is larger in any channel than

    (|dO_i| max_j |V_j| + |delta_i|) max_jd |K_jd|

over the keys that the row lists. The largest power of two that keeps this below 2^30, ``r_i``, is the row's scale: the
fused kernel adds integers ``round(r_i * part)``, and the sum of them fits in 32 bits. The error is half a unit for each
part, 1e-7 to 2e-6 of the gradient on ordinary data, where rounding it to bf16 makes 1.7e-3.

Three plain Triton kernels: maxima of the tiles of keys and values; scales beside the other statistics of the rows, and
zeros to add to; and integers back to gradients. A bound that is no number makes the scale NaN, and so the row.
"""

import triton
import triton.language as tl

from sparsetrain_kernels.block_pattern.triton.before_after import add_chunks, read_rows, write_row_stats
from sparsetrain_kernels.block_pattern.triton.geometry import key_block_at, key_list, place_of, read_item

SLACK = tl.constexpr(1.02)
"""What rounding adds to the bound: of dS to 16 bits, of the exponentials and of the log-sum-exp."""


@triton.jit
def _norms(x):
    """Euclidean norms of rows, or their sums of magnitudes, which are not less, where squares leave fp32."""
    squares = tl.sum(x * x, 1)
    return tl.where((squares > 1e-30) & (squares < float("inf")), tl.sqrt(squares), tl.sum(tl.abs(x), 1))


@triton.jit
def _bits(x):
    """Magnitudes as integers in the same order, with NaN above infinity: their maximum does not lose it."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def tile_maxima_kernel(
    key_ptr,
    value_ptr,
    key_max_ptr,
    value_max_ptr,
    items_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    items,
    rows,
    padded_tiles,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    TPB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest element of the keys and the largest norm of the values of every tile, as ``_bits``, int32 ``[B,
    KV_HEADS, padded_tiles]``. Rows past a document's end count where the fused kernel reads them."""
    kv_head, item, batch = place_of(tl.program_id(0), items, KV_HEADS)
    kv_head = kv_head.to(tl.int64)
    document, _, tile, _, padded = read_item(items_ptr, item)
    if tile < 0:
        return
    row = document + tile * TILE + tl.arange(0, TILE)
    dim = tl.arange(0, D)
    mask = (row < rows)[:, None]
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    key = tl.load(key_ptr + row[:, None] * key_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row[:, None] * value_stride_n + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    place = (batch * KV_HEADS + kv_head) * padded_tiles + padded * TPB + tile
    tl.store(key_max_ptr + place, tl.max(tl.max(_bits(key), 1), 0))
    tl.store(value_max_ptr + place, tl.max(_bits(_norms(value)), 0))


@triton.jit
def _listed_maxima(
    key_max_ptr, value_max_ptr, far_ptr, tile, window, sinks, FAR: tl.constexpr, TPB: tl.constexpr, SCAN: tl.constexpr
):
    """The maxima over the key tiles that a query tile lists."""
    query_block = tile // TPB
    n_sink, n_far, first = key_list(far_ptr, query_block, window, sinks, FAR)
    listed = (n_sink + n_far + query_block - first + 1) * TPB
    key_max = tl.zeros([SCAN], tl.int32)
    value_max = tl.zeros([SCAN], tl.int32)
    for start in range(0, listed, SCAN):
        i = start + tl.arange(0, SCAN)
        key_block = key_block_at(far_ptr, i // TPB, query_block, n_sink, n_far, first)
        key_tile = key_block * TPB + i % TPB
        mask = (i < listed) & (key_tile <= tile)
        key_max = tl.maximum(key_max, tl.load(key_max_ptr + key_tile, mask=mask, other=0))
        value_max = tl.maximum(value_max, tl.load(value_max_ptr + key_tile, mask=mask, other=0))
    return tl.max(key_max, 0).to(tl.float32, bitcast=True), tl.max(value_max, 0).to(tl.float32, bitcast=True)


@triton.jit
def _place_head_by_head(pid, items, HEADS: tl.constexpr):
    """The head, item and batch of a number: items fastest, then heads and the batch, as the fused kernel takes them.

    The two kernels around it count down. What it reads first is then what was written last before it, and what it added
    to last is what is read first behind it: in the L2 cache, both.
    """
    return pid // items % HEADS, pid % items, (pid // items // HEADS).to(tl.int64)


@triton.jit
def fixed_point_rows_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    padded_scale_ptr,
    sum_ptr,
    key_max_ptr,
    value_max_ptr,
    far_ptr,
    items_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_lse_stride_b,
    grad_lse_stride_h,
    grad_lse_stride_n,
    items,
    rows,
    padded_rows,
    padded_tiles,
    window,
    sinks,
    period,
    far_stride_h,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    TPB: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FAR: tl.constexpr,
    SCAN: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """The statistics of the rows; beside them their scales, fp32 ``[B, HEADS, padded_rows]``; and zeros, int32 ``[B,
    HEADS, rows, D]``. Grid: ``ROWS`` rows of a tile fastest, then items, heads and the batch, from the end."""
    PARTS: tl.constexpr = TILE // ROWS
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    part = pid % PARTS
    head, item, batch = _place_head_by_head(pid // PARTS, items, HEADS)
    document, length, tile, _, padded = read_item(items_ptr, item)
    if tile < 0:
        return
    read = read_rows(
        out_ptr,
        grad_out_ptr,
        document,
        length,
        tile * PARTS + part,
        batch,
        head,
        out_stride_b,
        out_stride_h,
        out_stride_n,
        grad_stride_b,
        grad_stride_h,
        grad_stride_n,
        0,
        D,
        D,
        TPB * TILE,
        ROWS,
    )
    row, _, is_row, _, _ = read
    sum_ptr += (batch * HEADS + head) * rows * D
    cells = row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(sum_ptr + cells, tl.zeros([ROWS, D], tl.int32), mask=is_row[:, None])
    # Behind loads and zeros, which are under way while the loop waits for the maxima.
    kv_head = head // GROUP
    far_ptr += kv_head * far_stride_h + tile // TPB % period * FAR
    maxima = (batch * (HEADS // GROUP) + kv_head) * padded_tiles + padded * TPB
    key_max, value_max = _listed_maxima(
        key_max_ptr + maxima, value_max_ptr + maxima, far_ptr, tile, window, sinks, FAR, TPB, SCAN
    )
    padded_row, grad, delta, lse = write_row_stats(
        read,
        lse_ptr,
        grad_lse_ptr,
        delta_ptr,
        padded_lse_ptr,
        padded_delta_ptr,
        tile * PARTS + part,
        padded,
        batch,
        head,
        grad_lse_stride_b,
        grad_lse_stride_h,
        grad_lse_stride_n,
        rows,
        0,
        padded_rows,
        HEADS,
        TPB * TILE,
        TPB * TILE,
        ROWS,
        GRAD_LSE,
    )
    tl.store(padded_scale_ptr + padded_row, tl.where(is_row, _row_scale(grad, delta, lse, key_max, value_max), 1.0))


@triton.jit
def _row_scale(grad, delta, lse, key_max, value_max):
    """The power of two of each row, from 2^-98 to 2^126, or NaN. Large scores are rounded more, and with them the
    weights, which the last factor allows for."""
    bound = SLACK * (_norms(grad) * value_max + tl.abs(delta)) * key_max * tl.exp2(tl.abs(lse) * 2.0**-20)
    exponent = bound.to(tl.int32, bitcast=True) >> 23
    scale = (tl.minimum(283 - exponent, 253) << 23).to(tl.float32, bitcast=True)
    return tl.where(bound < float("inf"), scale, float("nan"))


@triton.jit(do_not_specialize=["sum_programs"])
def fixed_point_finish_kernel(
    sum_ptr,
    padded_scale_ptr,
    grad_query_ptr,
    items_ptr,
    partial_ptr,
    grad_key_ptr,
    grad_value_ptr,
    split_items_ptr,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
    items,
    rows,
    padded_rows,
    scale,
    sum_programs,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    split_items,
    chunk,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    TPB: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Integers to the gradient of queries, a tile a program, in the order of the rows' kernel; before them, in
    ``sum_programs`` programs, the sums over the chunks of split sink tiles."""
    if SUMS and tl.program_id(0) < sum_programs:
        add_chunks(
            tl.program_id(0),
            partial_ptr,
            grad_key_ptr,
            grad_value_ptr,
            split_items_ptr,
            grad_key_stride_b,
            grad_key_stride_h,
            grad_key_stride_n,
            grad_value_stride_b,
            grad_value_stride_h,
            grad_value_stride_n,
            split_items,
            chunk,
            KV_HEADS,
            D,
            D,
            TPB * TILE,
            TILE,
            ROWS,
        )
        return
    head, item, batch = _place_head_by_head(tl.num_programs(0) - 1 - tl.program_id(0), items, HEADS)
    document, length, tile, _, padded = read_item(items_ptr, item)
    position = tile * TILE + tl.arange(0, TILE)
    is_row = (position < length) & (position >= 0)
    mask = is_row[:, None]
    row = document + position
    dim = tl.arange(0, D)
    padded_row = (batch * HEADS + head) * padded_rows + padded * (TPB * TILE) + position
    power = tl.load(padded_scale_ptr + padded_row, mask=is_row, other=1.0)
    # The reciprocal of a power of two, exactly.
    factor = ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    factor = tl.where(power == power, factor, float("nan"))
    sum_ptr += (batch * HEADS + head) * rows * D
    total = tl.load(sum_ptr + row[:, None] * D + dim[None, :], mask=mask, other=0).to(tl.float32)
    grad = (total * factor[:, None] * scale).to(grad_query_ptr.dtype.element_ty)
    grad_query_ptr += batch * grad_query_stride_b + head.to(tl.int64) * grad_query_stride_h
    tl.store(grad_query_ptr + row[:, None] * grad_query_stride_n + dim[None, :], grad, mask=mask)
