"""The gradients of queries and thresholds. One program per 128 query rows of one head, over the keys of the forward
kernel: a producer warpgroup, and two consumer warpgroups of 64 rows each.

A step is 64 keys: the neighbours that every row sees, then those that not every row does, the diagonal among them; then
the selected keys, those that not every row sees first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsetrain_kernels.block_pattern.hopper.geometry import HALF, TILE, exp2, product, store_rows, tma_load
from sparsetrain_kernels.selected_keys.hopper.tiles import (
    all_threads,
    copy_async,
    copy_rows,
    describe_neighbours,
    gate,
    init_barriers,
    listed_at,
    neighbours,
    seen_or,
    sums_of_threads,
    tile_of_program,
    wait_empty,
    wait_full,
    where_inside,
)

KEYS = gl.constexpr(64)
"""Of a step."""


@gluon.jit
def _producer(
    descriptors, sources, buffers, barriers, where, steps, D: gl.constexpr, GATE: gl.constexpr, PACKED: gl.constexpr
):
    q_desc, k_desc, v_desc, do_desc = descriptors
    key_ptr, value_ptr, key_stride, value_stride, keys_ptr, seen_ptr, scores_ptr, doc_end_ptr = sources
    q_bufs, do_bufs, k_ring, v_ring, seen_ring, score_ring, index_ring = buffers
    q_full, full, empty = barriers
    batch, head, kv_head, first, tokens, window = where
    n_whole, n_near, n_rest, n_listed, whole = steps
    STAGES: gl.constexpr = k_ring.shape[0]
    mbarrier.expect(q_full, TILE * D * 4)
    for w in gl.static_range(2):
        tma_load(q_desc, [batch, head, first + w * HALF, 0], q_full, q_bufs.index(w))
        tma_load(do_desc, [batch, head, first + w * HALF, 0], q_full, do_bufs.index(w))
    for step in range(n_near):
        slot = step % STAGES
        # From the diagonal, which is the first masked one, backwards.
        start = first - (step + 1) * KEYS
        if step >= n_whole:
            start = gl.where(step < n_whole + TILE // KEYS, first + (step - n_whole) * KEYS, start + TILE)
        wait_empty(empty, step, STAGES)
        if step >= n_whole:
            describe_neighbours(
                seen_ring.index(slot), score_ring.index(slot), start, first, tokens, window, doc_end_ptr, PACKED
            )
            all_threads()
        mbarrier.expect(full.index(slot), KEYS * D * 4)
        tma_load(k_desc, [batch, kv_head, start, 0], full.index(slot), k_ring.index(slot))
        tma_load(v_desc, [batch, kv_head, start, 0], full.index(slot), v_ring.index(slot))
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, KEYS, LANES)
    index = gl.load(keys_ptr + listed_at(n_listed * 0, n_rest, whole, KEYS) + lane)
    for i in range(n_listed):
        step = n_near + i
        slot = step % STAGES
        index_ring.index(i % 2).store(index)
        all_threads()
        following = gl.load(keys_ptr + listed_at(gl.minimum(i + 1, n_listed - 1), n_rest, whole, KEYS) + lane)
        wait_empty(empty, step, STAGES)
        copy_rows(key_ptr, key_stride, index_ring.index(i % 2), k_ring.index(slot).reshape([KEYS, D]))
        copy_async(score_ring.index(slot), scores_ptr + index)
        if i < n_rest:
            copy_async(seen_ring.index(slot), seen_ptr + listed_at(i, n_rest, whole, KEYS) + lane)
        copy_rows(value_ptr, value_stride, index_ring.index(i % 2), v_ring.index(slot).reshape([KEYS, D]))
        async_copy.mbarrier_arrive(full.index(STAGES + i % STAGES), increment_count=False)
        index = following


@gluon.jit
def _step(
    s,
    dp,
    dq,
    grad_threshold,
    operands,
    step,
    MASKED: gl.constexpr,
    LISTED: gl.constexpr,
    GATE: gl.constexpr,
    D: gl.constexpr,
):
    """64 keys against the 64 queries of this warpgroup. Arrives with S of this step done and dP in flight, and leaves
    so for the next one. The next S is issued before this step's dS, which then has it to hide behind."""
    q, do, rows, rings, full, empty, n_near, last, to_log2 = operands
    line, lse, delta, threshold = rows
    k_ring, v_ring, seen_ring, score_ring = rings
    STAGES: gl.constexpr = k_ring.shape[0]
    dtype: gl.constexpr = k_ring.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot = step % STAGES
    k = k_ring.index(slot).reshape([KEYS, D])
    p = exp2(s * to_log2 - gl.expand_dims(lse, 1))
    if MASKED:
        p = seen_or(seen_ring.index(slot), p, line, False)
    wait_full(full, step + 1, n_near, step < last, STAGES)
    if LISTED:
        fence_async_shared()
    dp = warpgroup_mma_wait(0, deps=(dp,))
    s = product(q, k_ring, step + 1, KEYS, D, STAGES)
    if GATE == "none":
        ds = p * (dp - gl.expand_dims(delta, 1))
    else:
        score = score_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        gates = gate(gl.expand_dims(score, 0), gl.expand_dims(threshold, 1))
        inside = where_inside(p, gates)
        if GATE == "value":
            ds = p * (gates * dp - gl.expand_dims(delta, 1))
            grad_threshold -= sums_of_threads(inside * dp)
        else:
            change = dp - gl.expand_dims(delta, 1)
            grad_threshold -= sums_of_threads(inside * change)
            ds = p * change
            if GATE == "log":
                ds = ds * gates
    left = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, D_LAYOUT, 2))
    dq = warpgroup_mma(left, k, dq, is_async=True)
    dp = product(do, v_ring, step + 1, KEYS, D, STAGES)
    s, dq = warpgroup_mma_wait(1, deps=(s, dq))
    mbarrier.arrive(empty.index(slot))
    return s, dp, dq, grad_threshold


@gluon.jit
def _consumer(
    W: gl.constexpr, buffers, barriers, where, steps, rows, out, scale, to_log2, D: gl.constexpr, GATE: gl.constexpr
):
    q_bufs, do_bufs, k_ring, v_ring, seen_ring, score_ring, _ = buffers
    q_full, full, empty = barriers
    _, _, _, first, tokens, _ = where
    n_whole, n_near, n_rest, n_listed, _ = steps
    lse_ptr, delta_ptr, threshold_ptr = rows
    dq_ptr, dq_stride_n, grad_threshold_ptr = out
    STAGES: gl.constexpr = k_ring.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    line = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    lse = gl.load(lse_ptr + first + line)
    delta = gl.load(delta_ptr + first + line)
    threshold = gl.load(threshold_ptr + first + line)
    rows = (line, lse, delta, threshold)
    mbarrier.wait(q_full, 0)
    # Queries stay in registers: read from shared memory in every step, they would leave its bandwidth for little else.
    q = q_bufs.index(W).reshape([HALF, D]).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
    do = do_bufs.index(W).reshape([HALF, D])
    last = n_near + n_listed - 1
    rings = (k_ring, v_ring, seen_ring, score_ring)
    operands = (q, do, rows, rings, full, empty, n_near, last, to_log2)
    dq = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    grad_threshold = sums_of_threads(gl.zeros([HALF, KEYS], gl.float32, S_LAYOUT))
    mbarrier.wait(full.index(0), 0)
    s = product(q, k_ring, 0, KEYS, D, STAGES)
    dp = product(do, v_ring, 0, KEYS, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    for step in range(n_whole):
        s, dp, dq, grad_threshold = _step(s, dp, dq, grad_threshold, operands, step, False, False, "none", D)
    for step in range(n_whole, n_near + n_rest):
        s, dp, dq, grad_threshold = _step(s, dp, dq, grad_threshold, operands, step, True, True, GATE, D)
    for step in range(n_near + n_rest, n_near + n_listed):
        s, dp, dq, grad_threshold = _step(s, dp, dq, grad_threshold, operands, step, False, True, GATE, D)
    warpgroup_mma_wait(0, deps=(dp,))
    store_rows(dq_ptr, dq * scale, first + W * HALF, dq_stride_n, tokens, D_LAYOUT)
    row = first + line
    grad_threshold = gl.convert_layout(gl.sum(grad_threshold, 1), line.type.layout)
    gl.store(grad_threshold_ptr + row, grad_threshold, mask=row < tokens)


@gluon.jit(do_not_specialize=["tokens", "window", "tiles", "capacity", "kv_heads", "group"])
def selected_bwd_dq_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    grad_threshold_ptr,
    keys_ptr,
    seen_ptr,
    counts_ptr,
    whole_ptr,
    scores_ptr,
    threshold_ptr,
    doc_start_ptr,
    doc_end_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
    tokens,
    padded_tokens,
    window,
    tiles,
    capacity,
    kv_heads,
    group,
    scale,
    to_log2,
    SHARED_SELECTION: gl.constexpr,
    GATE: gl.constexpr,
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid and lists as in the forward kernel. Tile descriptors are of ``[1, 1, 64, D]``. The log-sum-exp (in units of
    log2), delta and threshold of rows have ``padded_tokens`` places a head, whole tiles."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    batch, kv_head, head, tile, selection = tile_of_program(tiles, kv_heads, group, SHARED_SELECTION)
    first = tile * TILE
    n_whole, n_edge = neighbours(first, tokens, window, doc_start_ptr, KEYS, PACKED)
    place = selection * tiles + tile
    keys_ptr += place * capacity
    seen_ptr += place * capacity
    listed = gl.load(counts_ptr + place)
    whole = gl.load(whole_ptr + place) // KEYS * KEYS
    n_rest = (listed - whole + KEYS - 1) // KEYS
    steps = (n_whole, n_whole + TILE // KEYS + n_edge, n_rest, whole // KEYS + n_rest, whole)

    q_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], do_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    seen_ring = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], FLAT)
    score_ring = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], FLAT)
    index_ring = gl.allocate_shared_memory(gl.int32, [2, KEYS], FLAT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    init_barriers(full, empty, STAGES)
    fence_async_shared()

    wide_batch = batch.to(gl.int64)
    wide_head = kv_head.to(gl.int64)
    key_ptr += wide_batch * key_stride_b + wide_head * key_stride_h
    value_ptr += wide_batch * value_stride_b + wide_head * value_stride_h
    scores_ptr += selection * tokens
    grad_query_ptr += wide_batch * grad_query_stride_b + head.to(gl.int64) * grad_query_stride_h
    pair = (batch * kv_heads * group + head).to(gl.int64)
    sources = (key_ptr, value_ptr, key_stride_n, value_stride_n, keys_ptr, seen_ptr, scores_ptr, doc_end_ptr)
    buffers = (q_bufs, do_bufs, k_ring, v_ring, seen_ring, score_ring, index_ring)
    barriers = (q_full, full, empty)
    where = (batch, head, kv_head, first, tokens, window)
    rows = (
        lse_ptr + pair * padded_tokens,
        delta_ptr + pair * padded_tokens,
        threshold_ptr + selection * padded_tokens,
    )
    out = (grad_query_ptr, grad_query_stride_n, grad_threshold_ptr + pair * tokens)
    gl.warp_specialize(
        [
            (
                _producer,
                ((q_desc, k_desc, v_desc, do_desc), sources, buffers, barriers, where, steps, D, GATE, PACKED),
            ),
            (_consumer, (0, buffers, barriers, where, steps, rows, out, scale, to_log2, D, GATE)),
            (_consumer, (1, buffers, barriers, where, steps, rows, out, scale, to_log2, D, GATE)),
        ],
        [4, 4],
        [240, 240],
    )
