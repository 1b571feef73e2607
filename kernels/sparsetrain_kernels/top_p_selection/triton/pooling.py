"""The kernels before a selection: the weights of a group of heads, and of neighbouring keys, pooled into one row."""

import triton
import triton.language as tl

from sparsetrain_kernels.top_p_selection.triton.rows import LARGEST, load_scores, positions, row_bounds


@triton.jit
def pool_heads_kernel(
    scores_ptr,
    lse_ptr,
    lengths_ptr,
    page_lists_ptr,
    page_counts_ptr,
    due_ptr,
    pooled_ptr,
    scores_stride_b,
    scores_stride_h,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    PAGES: tl.constexpr,
    DUE: tl.constexpr,
    LSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Log of the largest or mean weight that the heads of a group give each key, fp16 ``[B, Hkv, M]``; -inf where there
    is none. Grid: chunks fastest, then KV heads, then the batch."""
    chunk = tl.program_id(0) % chunks
    kv_head = tl.program_id(0) // chunks % KV_HEADS
    batch = tl.program_id(0) // chunks // KV_HEADS
    columns, length, end = row_bounds(
        lengths_ptr,
        lengths_ptr,
        page_counts_ptr,
        due_ptr,
        batch,
        kv_head,
        all_columns,
        0,
        KV_HEADS,
        False,
        PAGES,
        DUE,
    )
    if PAGES:
        page_lists_ptr += batch.to(tl.int64) * pages_stride_b + kv_head.to(tl.int64) * pages_stride_h
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row = scores_ptr + batch.to(tl.int64) * scores_stride_b + head.to(tl.int64) * scores_stride_h
        score, exists = load_scores(row, page_lists_ptr, column, columns, length, 0, end, PAGES)
        lse = tl.load(lse_ptr + batch * KV_HEADS * GROUP + head) if LSE else 0.0
        weight = tl.where(exists, score - lse, float("-inf"))
        peak = tl.maximum(best, weight)
        if MEAN:
            base = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp(best - base) + tl.exp(weight - base)
        best = peak
    some = best > float("-inf")
    if MEAN:
        best += tl.log(tl.where(some, total, 1.0) / GROUP)
    best = tl.where(some, tl.maximum(best, -LARGEST), float("-inf"))
    pooled_ptr += (batch.to(tl.int64) * KV_HEADS + kv_head) * all_columns
    tl.store(pooled_ptr + column, best.to(tl.float16), mask=column < all_columns)


@triton.jit
def pool_neighbours_kernel(
    rows_ptr,
    page_lists_ptr,
    pooled_ptr,
    pages_stride_b,
    pages_stride_h,
    all_columns,
    chunks,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest of the ``WIDTH`` scores around each position, of ``[B, Hkv, M]``. Grid as above."""
    chunk = tl.program_id(0) % chunks
    row = tl.program_id(0) // chunks
    if PAGES:
        page_lists_ptr += (row // KV_HEADS).to(tl.int64) * pages_stride_b
        page_lists_ptr += (row % KV_HEADS).to(tl.int64) * pages_stride_h
    rows_ptr += row.to(tl.int64) * all_columns
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    position = positions(page_lists_ptr, column, all_columns, PAGES)
    own = tl.load(rows_ptr + column, mask=column < all_columns, other=float("-inf")).to(tl.float32)
    best = own
    for shift in tl.static_range(-(WIDTH // 2), WIDTH // 2 + 1):
        other = column + shift
        exists = (other >= 0) & (other < all_columns)
        near = tl.load(rows_ptr + other, mask=exists, other=float("-inf")).to(tl.float32)
        # Candidate pages need not follow one another; behind the last one there are no scores.
        place = positions(page_lists_ptr, tl.maximum(other, 0), all_columns, PAGES)
        best = tl.maximum(best, tl.where(place == position + shift, near, float("-inf")))
    best = tl.where(own > float("-inf"), best, float("-inf"))
    tl.store(pooled_ptr + row.to(tl.int64) * all_columns + column, best.to(tl.float16), mask=column < all_columns)
