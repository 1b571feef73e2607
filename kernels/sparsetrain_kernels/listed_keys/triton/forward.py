"""The forward kernel: one program per tile of a segment's rows, with all heads of a group, over the segment's keys."""

import triton
import triton.language as tl

from sparsetrain_kernels.gathered_rows import gather
from sparsetrain_kernels.listed_keys.triton.work import FIELDS
from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated


@triton.jit
def listed_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    keys_ptr,
    counts_ptr,
    tiles_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    tokens,
    segments,
    tiles,
    capacity,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to ``ROWS`` rows of the heads of a group, one after another the heads of a row. Grid: tiles fastest, so that
    what neighbouring tiles read of one KV head stays in L2, then KV heads, then the batch.

    Whole tiles of the list come first, without a mask; then its rest, then the segment's own range.
    """
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(0) // tiles // KV_HEADS).to(tl.int64)
    segment, first, end, low = read_tile(tiles_ptr, tile)
    if first >= end:
        return
    row, head, is_row = rows_of_tile(first, end, kv_head, GROUP, ROWS, BLOCK_M)
    dim = tl.arange(0, D_PAD)
    is_query = is_row[:, None] & (dim < D)[None, :]
    query_cells = query_ptr + batch * query_stride_b + (head * query_stride_h + row * query_stride_n)[:, None]
    query = tl.load(query_cells + dim[None, :], mask=is_query, other=0.0)
    key_ptr += batch * key_stride_b + kv_head * key_stride_h
    value_ptr += batch * value_stride_b + kv_head * value_stride_h
    place = (batch * KV_HEADS + kv_head) * segments + segment
    keys_ptr += place * capacity
    listed = tl.load(counts_ptr + place)

    to_log2 = scale * LOG2E
    column = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in tl.range(0, listed // BLOCK_N):
        index = tl.load(keys_ptr + i * BLOCK_N + column)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, to_log2, "straight", PRECISION)
    rest = listed // BLOCK_N * BLOCK_N
    n_list = tl.cdiv(listed - rest, BLOCK_N)
    for i in tl.range(0, n_list + tl.cdiv(end - low, BLOCK_N)):
        index, is_key = masked_keys(keys_ptr, i, n_list, rest, listed, low, end, first, column, BLOCK_N)
        key, value = gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D, D_PAD)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        # Listed keys lie before all rows of the segment.
        visible = is_key[None, :] & (index[None, :] <= row[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, 1.0, value, peak, total, acc, to_log2, "straight", PRECISION)

    out_cells = out_ptr + batch * out_stride_b + (head * out_stride_h + row * out_stride_n)[:, None] + dim[None, :]
    tl.store(out_cells, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
    lse = (peak * to_log2 + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (batch * KV_HEADS * GROUP + head) * tokens + row, lse, mask=is_row)


@triton.jit
def read_tile(tiles_ptr, tile):
    """A tile's segment, its first row, the row past its last, and the first key of the segment's own range."""
    cell = tiles_ptr + tile * FIELDS
    return tl.load(cell), tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 3)


@triton.jit
def rows_of_tile(first, end, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each line of a tile its row and query head, int64, and whether it exists. Lines that do not see a key."""
    line = tl.arange(0, BLOCK_M)
    row = first + line // GROUP
    is_row = (line < ROWS * GROUP) & (row < end)
    return row.to(tl.int64), kv_head * GROUP + line % GROUP, is_row


@triton.jit
def masked_keys(keys_ptr, i, n_list, rest, listed, low, end, first, column, BLOCK_N: tl.constexpr):
    """Tile ``i`` of the keys that come with a mask, and which of them exist: first the rest of the list, then the own
    range. Those that do not exist are the first row's, which all rows see."""
    is_listed = i < n_list
    place = tl.where(is_listed, rest + i * BLOCK_N, low + (i - n_list) * BLOCK_N) + column
    is_key = place < tl.where(is_listed, listed, end)
    from_list = tl.load(keys_ptr + place, mask=place < tl.where(is_listed, listed, 0), other=0)
    index = tl.where(is_listed, from_list, place)
    return tl.where(is_key, index, first), is_key
