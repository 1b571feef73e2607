"""The sums behind ``topk_statistics``: one walk over keys and rows, which are the same numbers, then the means."""

import triton
import triton.language as tl


@triton.jit
def statistics_sums_kernel(
    scores_ptr,
    threshold_ptr,
    threshold_sums_ptr,
    exit_ptr,
    interior_start_ptr,
    interior_end_ptr,
    interior_size_ptr,
    saturated_size_ptr,
    doc_start_ptr,
    doc_end_ptr,
    sums_ptr,
    line,
    tokens,
    window,
    sinks,
    AGE_1: tl.constexpr,
    AGE_2: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fp64 ``[7, PARTS]``, of every ``PARTS``-th block: full rows; their saturated keys; interior keys; the gates of
    interior and selected keys; selected pairs, and those at least ``AGE_1`` and ``AGE_2`` windows old."""
    rows = tl.zeros([BLOCK], tl.int64)
    saturated = tl.zeros([BLOCK], tl.int64)
    interior = tl.zeros([BLOCK], tl.int64)
    gates = tl.zeros([BLOCK], tl.float64)
    pairs = tl.zeros([BLOCK], tl.int64)
    old = tl.zeros([BLOCK], tl.int64)
    older = tl.zeros([BLOCK], tl.int64)
    for first in range(tl.program_id(0) * BLOCK, line, PARTS * BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < line
        token = place % tokens
        is_full = tl.load(threshold_ptr + place, mask=inside, other=float("-inf")) > float("-inf")
        rows += is_full.to(tl.int64)
        saturated += tl.load(saturated_size_ptr + place, mask=inside & is_full, other=0)
        interior += tl.load(interior_size_ptr + place, mask=inside, other=0)
        # In each row its score less the row's threshold.
        exit = tl.load(exit_ptr + place, mask=inside, other=0)
        start = tl.load(interior_start_ptr + place, mask=inside, other=0)
        end = tl.minimum(tl.load(interior_end_ptr + place, mask=inside, other=0), exit)
        score = tl.load(scores_ptr + place, mask=inside, other=0.0).to(tl.float64)
        before = threshold_sums_ptr + place - token - 1
        thresholds = tl.load(before + end, mask=inside & (end > 0), other=0.0)
        thresholds -= tl.load(before + start, mask=inside & (start > 0), other=0.0)
        gates += score * (end - start).to(tl.float64) - thresholds
        doc_start = tl.zeros([BLOCK], tl.int32)
        doc_end = tl.zeros([BLOCK], tl.int32) + tokens
        if PACKED:
            doc_start = tl.load(doc_start_ptr + token, mask=inside, other=0)
            doc_end = tl.load(doc_end_ptr + token, mask=inside, other=0)
        life = exit - tl.minimum(token + window, doc_end)
        life = tl.where(inside & (token >= doc_start + sinks), life, 0)
        pairs += tl.maximum(life, 0)
        old += tl.maximum(life - AGE_1 * window, 0)
        older += tl.maximum(life - AGE_2 * window, 0)
    sums_ptr += tl.program_id(0)
    tl.store(sums_ptr, tl.sum(rows, 0).to(tl.float64))
    tl.store(sums_ptr + PARTS, tl.sum(saturated, 0).to(tl.float64))
    tl.store(sums_ptr + 2 * PARTS, tl.sum(interior, 0).to(tl.float64))
    tl.store(sums_ptr + 3 * PARTS, tl.sum(gates, 0))
    tl.store(sums_ptr + 4 * PARTS, tl.sum(pairs, 0).to(tl.float64))
    tl.store(sums_ptr + 5 * PARTS, tl.sum(old, 0).to(tl.float64))
    tl.store(sums_ptr + 6 * PARTS, tl.sum(older, 0).to(tl.float64))


@triton.jit
def statistics_means_kernel(sums_ptr, means_ptr, topk, PARTS: tl.constexpr):
    """fp64 ``[6]``, in the order of ``topk_statistics``. Where there is nothing to take a mean of, NaN."""
    part = sums_ptr + tl.arange(0, PARTS)
    rows = tl.sum(tl.load(part), 0)
    saturated = tl.sum(tl.load(part + PARTS), 0)
    interior = tl.sum(tl.load(part + 2 * PARTS), 0)
    gates = tl.sum(tl.load(part + 3 * PARTS), 0)
    pairs = tl.sum(tl.load(part + 4 * PARTS), 0)
    places = rows * topk
    tl.store(means_ptr, (saturated + gates) / places)
    tl.store(means_ptr + 1, (saturated + interior) / rows)
    tl.store(means_ptr + 2, interior / rows)
    tl.store(means_ptr + 3, saturated / places)
    tl.store(means_ptr + 4, tl.sum(tl.load(part + 5 * PARTS), 0) / pairs)
    tl.store(means_ptr + 5, tl.sum(tl.load(part + 6 * PARTS), 0) / pairs)
