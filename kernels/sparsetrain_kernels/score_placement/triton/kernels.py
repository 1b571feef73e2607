"""Timestep normalisation and its gradient: one program walks along a head, forward, then backward.

The arithmetic is that of :mod:`sparsetrain_kernels.score_placement.reference`, all of it in fp64. Running sums start
anew with each document, so nothing of a document reaches the next one.
"""

import triton
import triton.language as tl


@triton.jit
def placement_fwd_kernel(
    linear_ptr,
    gain_ptr,
    position_ptr,
    first_ptr,
    scores_ptr,
    total_ptr,
    squares_ptr,
    linear_stride_b,
    linear_stride_h,
    linear_stride_n,
    gain_stride_b,
    gain_stride_h,
    gain_stride_n,
    tokens,
    SLOPE: tl.constexpr,
    HEADS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores, and the running sums of a document's scores and of their squares: ``[B, HEADS, tokens]``."""
    pair = tl.program_id(0).to(tl.int64)
    linear_ptr += pair // HEADS * linear_stride_b + pair % HEADS * linear_stride_h
    gain_ptr += pair // HEADS * gain_stride_b + pair % HEADS * gain_stride_h
    before = tl.full([], 0.0, tl.float64)
    before_squares = tl.full([], 0.0, tl.float64)
    for start in range(0, tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < tokens
        wide = index.to(tl.int64)
        linear = tl.load(linear_ptr + wide * linear_stride_n, mask=inside, other=0.0).to(tl.float64)
        gain = tl.load(gain_ptr + wide * gain_stride_n, mask=inside, other=0.0).to(tl.float64)
        position = tl.load(position_ptr + index, mask=inside, other=0)
        first = tl.load(first_ptr + index, mask=inside, other=0)
        begins = (first == index).to(tl.int32)
        total, squares, _ = tl.associative_scan((linear, linear * linear, begins), 0, _add_unless_it_begins)
        total += tl.where(first < start, before, 0.0)
        squares += tl.where(first < start, before_squares, 0.0)
        _, _, _, normal = _normalize(linear, total, squares, position, EPSILON)
        place = pair * tokens + index
        # The slope's part is one of fp32 in plain PyTorch too.
        scores = normal * gain + (position.to(tl.float32) * SLOPE).to(tl.float64)
        tl.store(scores_ptr + place, scores.to(scores_ptr.dtype.element_ty), mask=inside)
        tl.store(total_ptr + place, total, mask=inside)
        tl.store(squares_ptr + place, squares, mask=inside)
        is_last = index == start + BLOCK - 1
        before = tl.sum(tl.where(is_last, total, 0.0), 0)
        before_squares = tl.sum(tl.where(is_last, squares, 0.0), 0)


@triton.jit
def next_score_kernel(
    linear_ptr,
    gain_ptr,
    position_ptr,
    total_ptr,
    squares_ptr,
    scores_ptr,
    after_ptr,
    squares_after_ptr,
    linear_stride_b,
    linear_stride_h,
    gain_stride_b,
    gain_stride_h,
    position_stride_b,
    pairs,
    SLOPE: tl.constexpr,
    HEADS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores of one token a row, and the moments with it, ``[B, HEADS]``, of ``BLOCK`` heads."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    batch = (pair // HEADS).to(tl.int64)
    head = (pair % HEADS).to(tl.int64)
    linear_at = linear_ptr + batch * linear_stride_b + head * linear_stride_h
    linear = tl.load(linear_at, mask=inside, other=0.0).to(tl.float64)
    gain = tl.load(gain_ptr + batch * gain_stride_b + head * gain_stride_h, mask=inside, other=0.0).to(tl.float64)
    position = tl.load(position_ptr + batch * position_stride_b, mask=inside, other=0)
    total = tl.load(total_ptr + pair, mask=inside, other=0.0) + linear
    squares = tl.load(squares_ptr + pair, mask=inside, other=0.0) + linear * linear
    _, _, _, normal = _normalize(linear, total, squares, position, EPSILON)
    scores = normal * gain + (position.to(tl.float32) * SLOPE).to(tl.float64)
    tl.store(scores_ptr + pair, scores.to(scores_ptr.dtype.element_ty), mask=inside)
    tl.store(after_ptr + pair, total, mask=inside)
    tl.store(squares_after_ptr + pair, squares, mask=inside)


@triton.jit
def placement_bwd_kernel(
    grad_ptr,
    linear_ptr,
    gain_ptr,
    position_ptr,
    first_ptr,
    total_ptr,
    squares_ptr,
    grad_linear_ptr,
    grad_gain_ptr,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    linear_stride_b,
    linear_stride_h,
    linear_stride_n,
    gain_stride_b,
    gain_stride_h,
    gain_stride_n,
    tokens,
    HEADS: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the scores before normalisation and of the gain at every token, ``[B, HEADS, tokens]``.

    A token's score is part of the sums of all later tokens of its document: their gradients add up from the end.
    """
    pair = tl.program_id(0).to(tl.int64)
    grad_ptr += pair // HEADS * grad_stride_b + pair % HEADS * grad_stride_h
    linear_ptr += pair // HEADS * linear_stride_b + pair % HEADS * linear_stride_h
    gain_ptr += pair // HEADS * gain_stride_b + pair % HEADS * gain_stride_h
    behind = tl.full([], 0.0, tl.float64)
    behind_squares = tl.full([], 0.0, tl.float64)
    blocks = tl.cdiv(tokens, BLOCK)
    for i in range(0, blocks):
        start = (blocks - 1 - i) * BLOCK
        index = start + tl.arange(0, BLOCK)
        inside = index < tokens
        wide = index.to(tl.int64)
        place = pair * tokens + index
        grad = tl.load(grad_ptr + wide * grad_stride_n, mask=inside, other=0.0).to(tl.float64)
        linear = tl.load(linear_ptr + wide * linear_stride_n, mask=inside, other=0.0).to(tl.float64)
        gain = tl.load(gain_ptr + wide * gain_stride_n, mask=inside, other=0.0).to(tl.float64)
        position = tl.load(position_ptr + index, mask=inside, other=0)
        total = tl.load(total_ptr + place, mask=inside, other=0.0)
        squares = tl.load(squares_ptr + place, mask=inside, other=0.0)
        mean, variance, inverse, normal = _normalize(linear, total, squares, position, EPSILON)
        tl.store(grad_gain_ptr + place, (grad * normal).to(grad_gain_ptr.dtype.element_ty), mask=inside)

        grad_normal = grad * gain
        direct = grad_normal * inverse
        grad_variance = grad_normal * (linear - mean) * (inverse * inverse * inverse) * -0.5
        grad_variance = tl.where(variance >= 0, grad_variance, 0.0)
        count = (position + 1).to(tl.float64)
        grad_total = (-direct - 2.0 * mean * grad_variance) / count
        grad_squares = grad_variance / count

        # Documents are told apart by their first tokens.
        first = tl.load(first_ptr + index, mask=inside, other=-1)
        next_first = tl.load(first_ptr + index + 1, mask=index + 1 < tokens, other=-1)
        ends = (first != next_first).to(tl.int32)
        grad_total, grad_squares, _ = tl.associative_scan(
            (grad_total, grad_squares, ends), 0, _add_unless_it_begins, reverse=True
        )
        goes_on = first == tl.load(first_ptr + start + BLOCK, mask=start + BLOCK < tokens, other=-1)
        grad_total += tl.where(goes_on & inside, behind, 0.0)
        grad_squares += tl.where(goes_on & inside, behind_squares, 0.0)
        grad_linear = direct + grad_total + 2.0 * linear * grad_squares
        tl.store(grad_linear_ptr + place, grad_linear.to(grad_linear_ptr.dtype.element_ty), mask=inside)
        behind = tl.sum(tl.where(index == start, grad_total, 0.0), 0)
        behind_squares = tl.sum(tl.where(index == start, grad_squares, 0.0), 0)


@triton.jit
def _normalize(linear, total, squares, position, EPSILON: tl.constexpr):
    """Mean, variance (below 0 where it was rounded), the inverse of the deviation, and the normalised score."""
    count = (position + 1).to(tl.float64)
    mean = total / count
    variance = squares / count - mean * mean
    inverse = 1.0 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + EPSILON)
    return mean, variance, inverse, (linear - mean) * inverse


@triton.jit
def _add_unless_it_begins(total, squares, begun, more, more_squares, begins):
    """Two running sums of which one follows the other, and whether it begins anew."""
    total = tl.where(begins > 0, more, total + more)
    squares = tl.where(begins > 0, more_squares, squares + more_squares)
    return total, squares, begun | begins
