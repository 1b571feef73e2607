"""The forward kernel: one program per tile of query rows and head, an online softmax over the listed key tiles."""

import triton
import triton.language as tl

from sparsetrain_kernels.block_pattern.triton.geometry import key_block_at, key_list, read_item
from sparsetrain_kernels.online_softmax import LOG2E, accumulate, tanh


@triton.jit
def block_pattern_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    sink_logits_ptr,
    far_ptr,
    items_ptr,
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
    items,
    rows,
    q_start,
    window,
    sinks,
    period,
    far_stride_h,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``BLOCK_M`` query rows of one head; ``BLOCK_M`` is a multiple of ``BLOCK_N``. Grid: heads fastest, so that the
    heads of a group share their keys in L2, then items, then the batch.

    The running maximum is kept in units of the raw products, or of soft-capped logits where there is a cap.
    """
    KEY_TILES: tl.constexpr = (BLOCK + BLOCK_N - 1) // BLOCK_N
    QUERY_TILES: tl.constexpr = (BLOCK + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % HEADS
    item = tl.program_id(0) // HEADS % items
    batch = tl.program_id(0) // HEADS // items
    document, length, tile, _, _ = read_item(items_ptr, item)
    if tile < 0:
        return

    query_block = tile // QUERY_TILES
    offset = tile % QUERY_TILES * BLOCK_M
    in_block = offset + tl.arange(0, BLOCK_M)
    position = query_block * BLOCK + in_block
    is_row = (position >= q_start) & (position < length)
    if BLOCK % BLOCK_M != 0:
        is_row = is_row & (in_block < BLOCK)
    row = document + position - q_start
    dim = tl.arange(0, D_PAD)
    query_ptr += batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
    is_query = is_row[:, None] & (dim < D)[None, :]
    query = tl.load(query_ptr + row[:, None] * query_stride_n + dim[None, :], mask=is_query, other=0.0)

    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += batch.to(tl.int64) * key_stride_b + kv_head * key_stride_h + document * key_stride_n
    value_ptr += batch.to(tl.int64) * value_stride_b + kv_head * value_stride_h + document * value_stride_n
    column = tl.arange(0, BLOCK_N)
    # 32-bit offsets within a tile, a 64-bit start for each.
    key_cells = column[None, :] * key_stride_n + dim[:, None]
    value_cells = column[:, None] * value_stride_n + dim[None, :]
    far_ptr += kv_head * far_stride_h + query_block % period * FAR

    to_log2 = LOG2E if SOFTCAP else scale * LOG2E
    if SINK_LOGITS:
        sink = tl.load(sink_logits_ptr + head).to(tl.float32) * (LOG2E / to_log2)
        peak = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    n_sink, n_far, first = key_list(far_ptr, query_block, window, sinks, FAR)
    before_own = (n_sink + n_far + query_block - first) * KEY_TILES
    # Every key of these tiles is visible to every row.
    for i in tl.range(0, before_own + offset // BLOCK_N):
        key_block = key_block_at(far_ptr, i // KEY_TILES, query_block, n_sink, n_far, first)
        in_key_block = i % KEY_TILES * BLOCK_N
        start = (key_block * BLOCK + in_key_block).to(tl.int64)
        key_start = key_ptr + start * key_stride_n + key_cells
        value_start = value_ptr + start * value_stride_n + value_cells
        if BLOCK % BLOCK_N == 0 and D == D_PAD:
            key = tl.load(key_start)
            value = tl.load(value_start)
        else:
            is_key = in_key_block + column < BLOCK
            key = tl.load(key_start, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
            value = tl.load(value_start, mask=is_key[:, None] & (dim < D)[None, :], other=0.0)
        logits = _logits(query, key, scale, softcap, SOFTCAP, PRECISION)
        if BLOCK % BLOCK_N != 0:
            logits = tl.where((in_key_block + column < BLOCK)[None, :], logits, float("-inf"))
        peak, total, acc = accumulate(logits, value, peak, total, acc, to_log2, PRECISION)
    # The tiles of the diagonal: keys up to each row's own, in the own block.
    for i in tl.range(0, BLOCK_M // BLOCK_N):
        in_key_block = offset + i * BLOCK_N + column
        start = (query_block * BLOCK + offset + i * BLOCK_N).to(tl.int64)
        is_key = (in_key_block < BLOCK) & (query_block * BLOCK + in_key_block < length)
        key_start = key_ptr + start * key_stride_n + key_cells
        value_start = value_ptr + start * value_stride_n + value_cells
        key = tl.load(key_ptr + start * key_stride_n + key_cells, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        value = tl.load(value_start, mask=is_key[:, None] & (dim < D)[None, :], other=0.0)
        logits = _logits(query, key, scale, softcap, SOFTCAP, PRECISION)
        visible = (in_key_block[None, :] <= in_block[:, None]) & is_key[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, acc = accumulate(logits, value, peak, total, acc, to_log2, PRECISION)

    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * out_stride_n + dim[None, :], out, mask=is_query)
    lse_ptr += (batch.to(tl.int64) * HEADS + head) * rows
    tl.store(lse_ptr + row, (peak * to_log2 + tl.log2(total)) / LOG2E, mask=is_row)


@triton.jit
def _logits(query, key, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Soft-capped logits, or the raw products where there is no cap."""
    logits = tl.dot(query, key, input_precision=PRECISION)
    if SOFTCAP:
        logits = softcap * tanh(logits * (scale / softcap))
    return logits
