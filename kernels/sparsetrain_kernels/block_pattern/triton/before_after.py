"""The small kernels before and after the backward kernels: the statistics of the query rows, and the sums over the
chunks of split sink tiles. Grids and items are those of the kernel beside them."""

import triton
import triton.language as tl

from sparsetrain_kernels.block_pattern.triton.geometry import place_of, read_item
from sparsetrain_kernels.online_softmax import LOG2E


@triton.jit
def read_rows(
    out_ptr,
    grad_out_ptr,
    document,
    length,
    tile,
    batch,
    head,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    q_start,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The ``BLOCK_M`` query rows of a tile: their numbers, places in their block, which of them exist, outputs and
    output gradients."""
    QUERY_TILES: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    in_block = tile % QUERY_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tile // QUERY_TILES * BLOCK + in_block
    is_row = (in_block < BLOCK) & (position >= q_start) & (position < length)
    row = document + position - q_start
    dim = tl.arange(0, D_PAD)
    mask = is_row[:, None] & (dim < D)[None, :]
    out_ptr += batch * out_stride_b + head.to(tl.int64) * out_stride_h
    grad_out_ptr += batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    out = tl.load(out_ptr + row[:, None] * out_stride_n + dim[None, :], mask=mask, other=0.0)
    grad = tl.load(grad_out_ptr + row[:, None] * grad_stride_n + dim[None, :], mask=mask, other=0.0)
    return row, in_block, is_row, out, grad


@triton.jit
def write_row_stats(
    read,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
    tile,
    padded,
    batch,
    head,
    grad_lse_stride_b,
    grad_lse_stride_h,
    grad_lse_stride_n,
    rows,
    q_start,
    padded_rows,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """What backward needs of the rows that :func:`read_rows` has read: ``delta``, fp32 ``[B, HEADS, rows]``; and it
    once more beside the log-sum-exp in units of log2, fp32 ``[B, HEADS, padded_rows]``.

    Those have whole blocks of ``PAD_BLOCK`` rows, those of the call's first block first. Rows that do not exist have
    an infinite log-sum-exp, which makes their weights zero, so that the other kernels read tiles without a mask.

    Returns the rows' places among the padded ones (of all heads), and what was read and written of them: output
    gradient, delta and log-sum-exp.
    """
    row, in_block, is_row, out, grad = read
    QUERY_TILES: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    grad = grad.to(tl.float32)
    pair = batch * HEADS + head
    delta = tl.sum(out.to(tl.float32) * grad, 1)
    if GRAD_LSE:
        grad_lse_ptr += batch * grad_lse_stride_b + head.to(tl.int64) * grad_lse_stride_h
        delta -= tl.load(grad_lse_ptr + row * grad_lse_stride_n, mask=is_row, other=0.0)
    lse = tl.load(lse_ptr + pair * rows + row, mask=is_row, other=float("inf")) * LOG2E
    tl.store(delta_ptr + pair * rows + row, delta, mask=is_row)
    padded_row = pair * padded_rows + (padded + tile // QUERY_TILES - q_start // BLOCK) * PAD_BLOCK + in_block
    tl.store(padded_lse_ptr + padded_row, lse, mask=in_block < PAD_BLOCK)
    tl.store(padded_delta_ptr + padded_row, delta, mask=in_block < PAD_BLOCK)
    return padded_row, grad, delta, lse


@triton.jit
def block_pattern_bwd_stats_kernel(
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    padded_lse_ptr,
    padded_delta_ptr,
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
    q_start,
    padded_rows,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """The statistics of the query rows, on the grid of the dQ kernel."""
    head, item, batch = place_of(tl.program_id(0), items, HEADS)
    document, length, tile, _, padded = read_item(items_ptr, item)
    if tile < 0:
        return
    read = read_rows(
        out_ptr,
        grad_out_ptr,
        document,
        length,
        tile,
        batch,
        head,
        out_stride_b,
        out_stride_h,
        out_stride_n,
        grad_stride_b,
        grad_stride_h,
        grad_stride_n,
        q_start,
        D,
        D_PAD,
        BLOCK,
        BLOCK_M,
    )
    write_row_stats(
        read,
        lse_ptr,
        grad_lse_ptr,
        delta_ptr,
        padded_lse_ptr,
        padded_delta_ptr,
        tile,
        padded,
        batch,
        head,
        grad_lse_stride_b,
        grad_lse_stride_h,
        grad_lse_stride_n,
        rows,
        q_start,
        padded_rows,
        HEADS,
        BLOCK,
        PAD_BLOCK,
        BLOCK_M,
        GRAD_LSE,
    )


@triton.jit
def add_chunks(
    place,
    partial_ptr,
    grad_key_ptr,
    grad_value_ptr,
    items_ptr,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    split_items,
    chunk,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the partial sums of each split sink tile in the order of its chunks. Places: ``ROWS`` rows of a tile fastest,
    then KV heads, items and the batch; the first chunk of a tile does the work."""
    KEY_TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = BLOCK_N // ROWS
    step = place % STEPS
    kv_head = (place // STEPS % KV_HEADS).to(tl.int64)
    item = place // (STEPS * KV_HEADS) % split_items
    batch = (place // (STEPS * KV_HEADS) // split_items).to(tl.int64)
    document, length, tile, piece, _ = read_item(items_ptr, item)
    if (tile < 0) | (piece != 0):
        return
    chunks = tl.cdiv(tl.cdiv(length, BLOCK), chunk)
    line = step * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D_PAD)
    cell = line[:, None] * D_PAD + dim[None, :]
    partial_ptr += ((batch * KV_HEADS + kv_head) * split_items + item) * (2 * BLOCK_N * D_PAD)
    grad_key = tl.zeros([ROWS, D_PAD], tl.float32)
    grad_value = tl.zeros([ROWS, D_PAD], tl.float32)
    for i in range(0, chunks):
        start = tl.cast(i, tl.int64) * (2 * BLOCK_N * D_PAD)
        grad_key += tl.load(partial_ptr + start + cell)
        grad_value += tl.load(partial_ptr + start + BLOCK_N * D_PAD + cell)
    in_block = tile % KEY_TILES * BLOCK_N + line
    position = tile // KEY_TILES * BLOCK + in_block
    mask = ((in_block < BLOCK) & (position < length))[:, None] & (dim < D)[None, :]
    row = document + position
    grad_key_ptr += batch * grad_key_stride_b + kv_head * grad_key_stride_h
    grad_value_ptr += batch * grad_value_stride_b + kv_head * grad_value_stride_h
    grad_key = grad_key.to(grad_key_ptr.dtype.element_ty)
    grad_value = grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + row[:, None] * grad_key_stride_n + dim[None, :], grad_key, mask=mask)
    tl.store(grad_value_ptr + row[:, None] * grad_value_stride_n + dim[None, :], grad_value, mask=mask)


@triton.jit
def block_pattern_bwd_sum_kernel(
    partial_ptr,
    grad_key_ptr,
    grad_value_ptr,
    items_ptr,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    split_items,
    chunk,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of all split sink tiles."""
    add_chunks(
        tl.program_id(0),
        partial_ptr,
        grad_key_ptr,
        grad_value_ptr,
        items_ptr,
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
        D_PAD,
        BLOCK,
        BLOCK_N,
        ROWS,
    )
