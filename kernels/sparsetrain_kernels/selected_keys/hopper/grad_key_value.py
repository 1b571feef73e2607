"""The gradients of keys, values and scores. One program per 128 keys of a KV head, over the rows that see them and all
heads of the group: a producer warpgroup, and two consumer warpgroups of 64 keys each.

The same kernel first goes over stretches of rows, each with its list of selected keys, and leaves partial sums; then
over neighbouring keys and the rows whose windows hold them, and adds the sums of what the stretches left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from sparsetrain_kernels.backend import TRITON_VERSION
from sparsetrain_kernels.block_pattern.hopper.geometry import HALF, TILE, acquire, product, store_rows, tma_load
from sparsetrain_kernels.block_pattern.hopper.grad_key_value import LN2, key_value_step
from sparsetrain_kernels.selected_keys.hopper.tiles import (
    all_threads,
    copy_rows,
    gate,
    sums_of_threads,
    where_among,
    where_inside,
)

NEWER_PTXAS = gl.constexpr(TRITON_VERSION > (3, 6))
"""Waits for what has long come, which ends a basic block: else this ptxas serialises all products."""


@gluon.jit
def _rows_of_step(where, step, BLOCK_M: gl.constexpr):
    """The head and the first row of a step: those that need a mask of every head, then the others head by head."""
    base, tile, n_before, whole, whole_end, n_masked, n_whole, group = where
    rest = step - group * n_masked
    member = gl.where(rest < 0, step // gl.maximum(n_masked, 1), rest // gl.maximum(n_whole, 1))
    place = step - member * n_masked
    place = gl.where(place < n_before, tile + place, whole_end + place - n_before)
    place = gl.where(rest < 0, place, whole + rest - member * n_whole)
    return member, base + place * BLOCK_M


@gluon.jit
def _producer(
    descriptors,
    lines,
    buffers,
    barriers,
    where,
    key_tile,
    batch,
    kv_head,
    kv_heads,
    padded_tokens,
    selection,
    LISTED: gl.constexpr,
):
    q_desc, k_desc, v_desc, do_desc = descriptors
    lse_desc, delta_desc, threshold_desc = lines
    k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring, threshold_ring = buffers
    kv_full, full, empty = barriers
    _, _, _, _, _, n_masked, n_whole, group = where
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    LINES: gl.constexpr = 3 if LISTED else 2
    if not LISTED:
        mbarrier.expect(kv_full, TILE * D * 4)
        for w in gl.static_range(2):
            tma_load(k_desc, [batch, kv_head, key_tile * TILE + w * HALF, 0], kv_full, k_buf.index(w))
            tma_load(v_desc, [batch, kv_head, key_tile * TILE + w * HALF, 0], kv_full, v_buf.index(w))
    for step in range(group * (n_masked + n_whole)):
        member, row = _rows_of_step(where, step, BLOCK_M)
        head = kv_head * group + member
        line = (batch * kv_heads * group + head) * padded_tokens + row
        slot = step % STAGES
        bar = acquire(full, empty, step, STAGES, BLOCK_M * D * 4 + BLOCK_M * 4 * LINES)
        tma_load(q_desc, [batch, head, row, 0], bar, q_ring.index(slot))
        tma_load(lse_desc, [line], bar, lse_ring.index(slot))
        tma_load(do_desc, [batch, head, row, 0], bar, do_ring.index(slot))
        tma_load(delta_desc, [line], bar, delta_ring.index(slot))
        if LISTED:
            tma_load(threshold_desc, [selection * padded_tokens + row], bar, threshold_ring.index(slot))


@gluon.jit
def _seen(where, p, step, W: gl.constexpr, BLOCK_M: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The weights of those of the 64 keys that each row of a masked step sees."""
    enter, count, _, _, _, rows = where
    _, row = _rows_of_step(rows, step, BLOCK_M)
    row = gl.expand_dims(row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, S_LAYOUT)), 0)
    enter = gl.expand_dims(enter.load(gl.SliceLayout(1, S_LAYOUT)), 1)
    return where_among(p, row, enter, gl.expand_dims(count.load(gl.SliceLayout(1, S_LAYOUT)), 1), False)


@gluon.jit
def _gates(where, p, slot):
    """Those of weights ``p``. Computed in every place that needs them: there are no registers to keep them in."""
    _, _, score, threshold_ring, _, _ = where
    LAYOUT: gl.constexpr = p.type.layout
    score = gl.expand_dims(score.load(gl.SliceLayout(1, LAYOUT)), 1)
    return gate(score, gl.expand_dims(threshold_ring.index(slot).load(gl.SliceLayout(0, LAYOUT)), 0))


@gluon.jit
def _weigh(where, p, slot, GATE: gl.constexpr):
    if GATE == "value" or GATE == "log":
        p = p * _gates(where, p, slot)
    return p


@gluon.jit
def _through_gates(where, p, grad, slot, grad_score):
    """Gradients times gates, and the gradient of the scores, to which gates strictly between 0 and 1 pass theirs."""
    gates = _gates(where, p, slot)
    inside = where_inside(p, gates)
    grad_score += sums_of_threads(inside * grad)
    if NEWER_PTXAS:
        mbarrier.wait(where[4], 0)
    return gates * grad, grad_score


@gluon.jit
def _gradient(where, p, dp, delta_ring, slot, grad_score, GATE: gl.constexpr):
    if GATE == "value":
        dp, grad_score = _through_gates(where, p, dp, slot, grad_score)
    change = dp - gl.expand_dims(delta_ring.index(slot).load(gl.SliceLayout(0, p.type.layout)), 0)
    if GATE == "log":
        change, grad_score = _through_gates(where, p, change, slot, grad_score)
    if GATE == "straight":
        _, grad_score = _through_gates(where, p, change, slot, grad_score)
    return p * change, grad_score


@gluon.jit
def _keys(
    source, W: gl.constexpr, ROWS: gl.constexpr, LISTED: gl.constexpr, PACKED: gl.constexpr, LAYOUT: gl.constexpr
):
    """``ROWS`` keys of a program, from the ``W``-th such part on: their rows, which exist, from which row on they are
    seen and up to which, and their scores."""
    keys_ptr, scores_ptr, exit_ptr, doc_end_ptr, listed, key_tile, tokens, window = source
    index = key_tile * TILE + W * ROWS + gl.arange(0, ROWS, LAYOUT)
    score = gl.zeros([ROWS], gl.float32, LAYOUT)
    if LISTED:
        is_key = index < listed
        # Slots past the end repeat the last key, without rows.
        index = gl.load(keys_ptr + gl.minimum(index, listed - 1))
        enter = index + window
        exit = gl.where(is_key, gl.load(exit_ptr + index), -1)
        score = gl.load(scores_ptr + index)
    else:
        is_key = index < tokens
        enter = index
        exit = gl.minimum(index + window, tokens)
        if PACKED:
            exit = gl.minimum(exit, gl.load(doc_end_ptr + index, mask=is_key, other=0))
    return index, is_key, enter, exit, score


@gluon.jit
def _consumer(
    W: gl.constexpr,
    buffers,
    barriers,
    rows,
    source,
    keys,
    out,
    parts,
    to_log2,
    LISTED: gl.constexpr,
    GATE: gl.constexpr,
    PACKED: gl.constexpr,
    STRETCH: gl.constexpr,
):
    k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring, threshold_ring = buffers
    kv_full, full, empty = barriers
    _, _, _, _, _, n_masked, n_whole, group = rows
    n_masked *= group
    n_steps = n_masked + n_whole * group
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    STAGES: gl.constexpr = q_ring.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    enter, count, score = keys
    enter, count, score = enter.slice(W * HALF, HALF), count.slice(W * HALF, HALF), score.slice(W * HALF, HALF)
    where = (enter, count, score, threshold_ring, kv_full, rows)
    k = k_buf.index(W).reshape([HALF, D])
    v = v_buf.index(W).reshape([HALF, D])
    operands = (k, v, (q_ring, do_ring), (lse_ring, delta_ring), full, empty)
    dk = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    dv = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    grad_score = sums_of_threads(gl.zeros([HALF, BLOCK_M], gl.float32, S_LAYOUT))
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0, pred=n_steps > 0)
    s = product(k, q_ring, 0, BLOCK_M, D, STAGES)
    dp = product(v, do_ring, 0, BLOCK_M, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    for step in range(n_masked):
        s, dp, dk, dv, grad_score = key_value_step(
            s,
            dp,
            dk,
            dv,
            operands,
            step,
            n_steps,
            to_log2,
            _seen,
            where,
            True,
            W,
            BLOCK_M,
            STAGES,
            _weigh,
            _gradient,
            GATE,
            grad_score,
        )
    for step in range(n_masked, n_steps):
        s, dp, dk, dv, grad_score = key_value_step(
            s,
            dp,
            dk,
            dv,
            operands,
            step,
            n_steps,
            to_log2,
            _seen,
            where,
            False,
            W,
            BLOCK_M,
            STAGES,
            _weigh,
            _gradient,
            GATE,
            grad_score,
        )
    warpgroup_mma_wait(0, deps=(dp,))

    partial_ptr, partial_scores_ptr, until_ptr, base, places, stretch = parts
    LINES: gl.constexpr = gl.SliceLayout(1, D_LAYOUT)
    index, is_key, enter, exit, _ = _keys(source, W, HALF, LISTED, PACKED, LINES)
    dim = gl.arange(0, D, gl.SliceLayout(0, D_LAYOUT))
    _, _, exit_ptr, _, _, key_tile, _, window = source
    if LISTED:
        place = gl.load(until_ptr + index) - 1 - (exit - 1) // STRETCH + stretch
        is_key = is_key & (place < places)
        cells = gl.expand_dims((base + place) * (2 * D), 1) + gl.expand_dims(dim, 0)
        gl.store(partial_ptr + cells, dk, mask=gl.expand_dims(is_key, 1))
        gl.store(partial_ptr + D + cells, dv, mask=gl.expand_dims(is_key, 1))
        grad_score = gl.convert_layout(gl.sum(grad_score, 1), LINES)
        gl.store(partial_scores_ptr + base + place, grad_score, mask=is_key)
    else:
        dk_ptr, dv_ptr, grad_scores_ptr, dk_stride, dv_stride, tokens = out
        exit = gl.load(exit_ptr + index, mask=is_key, other=0)
        enter = index + window
        stretches = gl.where(exit > enter, (exit - 1) // STRETCH - enter // STRETCH + 1, 0)
        place = base + gl.load(until_ptr + index, mask=is_key, other=0) - stretches
        is_listed = (stretches > 0) & (place < base + places)
        cells = gl.expand_dims(place * (2 * D), 1) + gl.expand_dims(dim, 0)
        dk += gl.load(partial_ptr + cells, mask=gl.expand_dims(is_listed, 1), other=0.0)
        dv += gl.load(partial_ptr + D + cells, mask=gl.expand_dims(is_listed, 1), other=0.0)
        grad = gl.load(partial_scores_ptr + place, mask=is_listed, other=0.0)
        gl.store(grad_scores_ptr + index, grad, mask=is_key)
        first = key_tile * TILE + W * HALF
        store_rows(dk_ptr, dk * (to_log2 * LN2), first, dk_stride, tokens, D_LAYOUT)
        store_rows(dv_ptr, dv, first, dv_stride, tokens, D_LAYOUT)


@gluon.jit(
    do_not_specialize=[
        "tokens",
        "window",
        "key_tiles",
        "stretches",
        "capacity",
        "kv_heads",
        "group",
        "first_head",
        "part_heads",
        "places",
    ]
)
def selected_bwd_dkv_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    threshold_desc,
    key_ptr,
    value_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_scores_ptr,
    partial_ptr,
    partial_scores_ptr,
    scores_ptr,
    exit_ptr,
    doc_end_ptr,
    keys_ptr,
    counts_ptr,
    places_until_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    tokens,
    padded_tokens,
    window,
    key_tiles,
    stretches,
    capacity,
    kv_heads,
    group,
    first_head,
    part_heads,
    places,
    to_log2,
    SHARED_SELECTION: gl.constexpr,
    STRETCH: gl.constexpr,
    LISTED: gl.constexpr,
    GATE: gl.constexpr,
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: KV heads fastest (``part_heads`` of them, from ``first_head`` on), then key tiles, with ``LISTED`` the
    stretches, and the batch. Tile descriptors are of ``[1, 1, 64, D]``, those of row statistics, ``padded_tokens`` a
    head, of ``[64]``. Sums and places are those of the plain Triton kernels."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    pid = gl.program_id(0)
    part_head = pid % part_heads
    kv_head = first_head + part_head
    key_tile = pid // part_heads % key_tiles
    stretch = pid // part_heads // key_tiles % stretches
    batch = pid // part_heads // key_tiles // stretches
    selection = batch * kv_heads + kv_head
    if SHARED_SELECTION:
        selection = batch
    wide_selection = selection.to(gl.int64)
    wide_batch = batch.to(gl.int64)
    wide_head = kv_head.to(gl.int64)
    listed = tokens
    if LISTED:
        entry = wide_selection * stretches + stretch
        listed = gl.load(counts_ptr + entry)
        if key_tile * TILE >= listed:
            return  # Most lists are much shorter than they may be, and a start of all partitions is not free.
        keys_ptr += entry * capacity
        scores_ptr += wide_selection * tokens
    exit_ptr += wide_selection * tokens
    source = (keys_ptr, scores_ptr, exit_ptr, doc_end_ptr, listed, key_tile, tokens, window)
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    index, is_key, enter, exit, score = _keys(source, 0, TILE, LISTED, PACKED, ALL)
    # Tiles of rows, counted from a multiple of them, that some keys see; all keys see those from whole to whole_end.
    base = key_tile * TILE
    end = tokens
    if LISTED:
        base = stretch * STRETCH
        end = gl.minimum(base + STRETCH, tokens)
    exit = gl.where(is_key, exit, -1)
    tile = (gl.maximum(gl.min(enter, 0), base) - base) // BLOCK_M
    tile_end = (gl.minimum(gl.max(exit, 0), end) - base + BLOCK_M - 1) // BLOCK_M
    whole = (gl.maximum(gl.max(enter, 0), base) - base + BLOCK_M - 1) // BLOCK_M
    # What does not exist may see anything: it is not stored.
    whole_end = gl.maximum(gl.minimum(gl.min(gl.where(is_key, exit, end), 0), end) - base, 0) // BLOCK_M
    whole = gl.maximum(gl.minimum(whole, tile_end), tile)
    whole_end = gl.maximum(whole, whole_end)
    n_before = whole - tile
    n_masked = gl.maximum(n_before + tile_end - whole_end, 0)
    where = (base, tile, n_before, whole, whole_end, n_masked, whole_end - whole, group)

    k_buf = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    threshold_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Consumers have no registers to keep these in.
    keys = (
        gl.allocate_shared_memory(gl.int32, [TILE], FLAT, enter),
        gl.allocate_shared_memory(gl.int32, [TILE], FLAT, gl.maximum(exit - enter, 0)),
        gl.allocate_shared_memory(gl.float32, [TILE], FLAT, score),
    )
    if LISTED:
        # Once, before the consumers begin: a program goes through many rows.
        key_ptr += wide_batch * key_stride_b + wide_head * key_stride_h
        value_ptr += wide_batch * value_stride_b + wide_head * value_stride_h
        mbarrier.arrive(kv_full, count=1)
        numbers = gl.allocate_shared_memory(gl.int32, [TILE], FLAT)
        numbers.store(index)
        all_threads()
        for w in gl.static_range(2):
            copy_rows(key_ptr, key_stride_n, numbers.slice(w * HALF, HALF), k_buf.index(w).reshape([HALF, D]))
            copy_rows(value_ptr, value_stride_n, numbers.slice(w * HALF, HALF), v_buf.index(w).reshape([HALF, D]))
        async_copy.commit_group()
        async_copy.wait_group(0)
    fence_async_shared()

    grad_key_ptr += wide_batch * grad_key_stride_b + wide_head * grad_key_stride_h
    grad_value_ptr += wide_batch * grad_value_stride_b + wide_head * grad_value_stride_h
    grad_scores_ptr += (wide_batch * kv_heads + wide_head) * tokens
    first_place = (wide_batch * part_heads + part_head) * places
    parts = (
        partial_ptr,
        partial_scores_ptr,
        places_until_ptr + wide_selection * tokens,
        first_place,
        places,
        stretch,
    )
    out = (grad_key_ptr, grad_value_ptr, grad_scores_ptr, grad_key_stride_n, grad_value_stride_n, tokens)
    buffers = (k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring, threshold_ring)
    barriers = (kv_full, full, empty)
    gl.warp_specialize(
        [
            (
                _producer,
                (
                    (q_desc, k_desc, v_desc, do_desc),
                    (lse_desc, delta_desc, threshold_desc),
                    buffers,
                    barriers,
                    where,
                    key_tile,
                    batch,
                    kv_head,
                    kv_heads,
                    padded_tokens,
                    selection,
                    LISTED,
                ),
            ),
            (
                _consumer,
                (0, buffers, barriers, where, source, keys, out, parts, to_log2, LISTED, GATE, PACKED, STRETCH),
            ),
            (
                _consumer,
                (1, buffers, barriers, where, source, keys, out, parts, to_log2, LISTED, GATE, PACKED, STRETCH),
            ),
        ],
        [4, 4],
        [240, 240],
    )
