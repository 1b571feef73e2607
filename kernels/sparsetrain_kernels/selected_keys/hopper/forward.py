"""The forward kernel. One program works on 128 query rows of one head in three partitions:

    producer     one warpgroup: neighbouring keys by TMA, selected ones by ``cp.async``, into rings of shared memory
    consumer 0   one warpgroup: query rows 0 to 63
    consumer 1   one warpgroup: query rows 64 to 127

A step is one tile of 128 keys, as ``tiles.py`` orders them; step 0 is the diagonal. Consumers work as in the kernel for
patterns of blocks: the product Q K^T of the next step and the product P V of the present one are in flight together.
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

from sparsetrain_kernels.block_pattern.hopper.forward import (
    LN2,
    partial_sums,
    round_pack,
    softmax_step,
    unpack,
)
from sparsetrain_kernels.block_pattern.hopper.geometry import HALF, TILE, product, store_rows, tma_load
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
    tile_of_program,
    wait_empty,
    wait_full,
)


@gluon.jit
def _producer(
    descriptors, sources, buffers, barriers, where, steps, D: gl.constexpr, GATE: gl.constexpr, PACKED: gl.constexpr
):
    q_desc, k_desc, v_desc = descriptors
    key_ptr, value_ptr, key_stride, value_stride, keys_ptr, seen_ptr, scores_ptr, doc_end_ptr = sources
    q_bufs, k_ring, v_ring, seen_ring, score_ring, index_ring = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch, head, kv_head, first, tokens, window = where
    n_whole, n_near, n_rest, n_listed, whole = steps
    KEY_STAGES: gl.constexpr = k_ring.shape[0]
    VALUE_STAGES: gl.constexpr = v_ring.shape[0]
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BYTES: gl.constexpr = TILE * D * 2
    mbarrier.expect(q_full, BYTES)
    for w in gl.static_range(2):
        tma_load(q_desc, [batch, head, first + w * HALF, 0], q_full, q_bufs.index(w))
    # The consumers read keys one step before values, so values are loaded one step later.
    for step in range(n_near):
        start = first - step * TILE
        slot = step % KEY_STAGES
        wait_empty(k_empty, step, KEY_STAGES)
        if (step == 0) | (step > n_whole):
            describe_neighbours(
                seen_ring.index(slot), score_ring.index(slot), start, first, tokens, window, doc_end_ptr, PACKED
            )
            all_threads()
        mbarrier.expect(k_full.index(slot), BYTES)
        tma_load(k_desc, [batch, kv_head, start, 0], k_full.index(slot), k_ring.index(slot))
        if step > 0:
            slot = (step - 1) % VALUE_STAGES
            wait_empty(v_empty, step - 1, VALUE_STAGES)
            mbarrier.expect(v_full.index(slot), BYTES)
            tma_load(v_desc, [batch, kv_head, start + TILE, 0], v_full.index(slot), v_ring.index(slot))
    slot = (n_near - 1) % VALUE_STAGES
    wait_empty(v_empty, n_near - 1, VALUE_STAGES)
    mbarrier.expect(v_full.index(slot), BYTES)
    tma_load(v_desc, [batch, kv_head, first - (n_near - 1) * TILE, 0], v_full.index(slot), v_ring.index(slot))
    lane = gl.arange(0, TILE, LANES)
    index = gl.load(keys_ptr + listed_at(n_listed * 0, n_rest, whole, TILE) + lane)
    for i in range(n_listed):
        step = n_near + i
        slot = step % KEY_STAGES
        index_ring.index(i % 2).store(index)
        all_threads()
        following = gl.load(keys_ptr + listed_at(gl.minimum(i + 1, n_listed - 1), n_rest, whole, TILE) + lane)
        wait_empty(k_empty, step, KEY_STAGES)
        copy_rows(key_ptr, key_stride, index_ring.index(i % 2), k_ring.index(slot).reshape([TILE, D]))
        if GATE != "straight":
            copy_async(score_ring.index(slot), scores_ptr + index)
        if i < n_rest:
            copy_async(seen_ring.index(slot), seen_ptr + listed_at(i, n_rest, whole, TILE) + lane)
        async_copy.mbarrier_arrive(k_full.index(KEY_STAGES + i % KEY_STAGES), increment_count=False)
        if i > 0:
            _load_values(value_ptr, value_stride, index_ring, v_ring, v_full, v_empty, i - 1, step - 1, D)
        index = following
    if n_listed > 0:
        last = n_listed - 1
        _load_values(value_ptr, value_stride, index_ring, v_ring, v_full, v_empty, last, n_near + last, D)


@gluon.jit
def _load_values(value_ptr, value_stride, index_ring, v_ring, v_full, v_empty, i, step, D: gl.constexpr):
    STAGES: gl.constexpr = v_ring.shape[0]
    wait_empty(v_empty, step, STAGES)
    copy_rows(value_ptr, value_stride, index_ring.index(i % 2), v_ring.index(step % STAGES).reshape([TILE, D]))
    async_copy.mbarrier_arrive(v_full.index(STAGES + i % STAGES), increment_count=False)


@gluon.jit
def _values(p, o, v_ring, v_full, step, n_near, LISTED: gl.constexpr, D: gl.constexpr):
    STAGES: gl.constexpr = v_ring.shape[0]
    wait_full(v_full, step, n_near, True, STAGES)
    if LISTED:
        fence_async_shared()
    return warpgroup_mma(p, v_ring.index(step % STAGES).reshape([TILE, D]), o, is_async=True)


@gluon.jit
def _advance(
    peak,
    total,
    p,
    alpha,
    o,
    operands,
    step,
    MASKED: gl.constexpr,
    LISTED: gl.constexpr,
    GATE: gl.constexpr,
    D: gl.constexpr,
):
    """From ``step - 1`` to ``step``. ``peak``, ``total`` and ``p`` include the step before, ``o`` does not yet, and
    waits for the factor ``alpha``."""
    q, buffers, barriers, n_near, line, threshold, to_log2 = operands
    _, k_ring, v_ring, seen_ring, score_ring, _ = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    KEY_STAGES: gl.constexpr = k_ring.shape[0]
    VALUE_STAGES: gl.constexpr = v_ring.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    slot = step % KEY_STAGES
    wait_full(k_full, step, n_near, True, KEY_STAGES)
    if LISTED:
        fence_async_shared()
    next_s = product(q, k_ring, step, TILE, D, KEY_STAGES)
    o = o * alpha[:, None]
    left = unpack(p, dtype, P_LAYOUT)
    next_o = _values(left, o, v_ring, v_full, step - 1, n_near, LISTED, D)
    s = warpgroup_mma_wait(1, deps=[next_s])
    if MASKED:
        s = seen_or(seen_ring.index(slot), s, line, True)
    peak, factor, weights = softmax_step(s, peak, to_log2)
    gated = weights
    if GATE != "straight":
        score = score_ring.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        gated = weights * gate(score[None, :], threshold[:, None])
    mbarrier.arrive(k_empty.index(slot), count=1)
    summed = gated if GATE == "log" else weights
    total = total * gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout))[:, None] + partial_sums(summed)
    p = round_pack(gated, dtype)
    alpha = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))
    # Long complete. It ends a basic block, which keeps ptxas from moving the softmax behind the wait below.
    mbarrier.wait(q_full, 0)
    o, left, p, total = warpgroup_mma_wait(0, deps=[next_o, left, p, total])
    mbarrier.arrive(v_empty.index((step - 1) % VALUE_STAGES), count=1)
    return peak, total, p, alpha, o


@gluon.jit
def _consumer(
    W: gl.constexpr,
    buffers,
    barriers,
    where,
    steps,
    threshold_ptr,
    out,
    to_log2,
    D: gl.constexpr,
    GATE: gl.constexpr,
):
    q_bufs, k_ring, v_ring, seen_ring, _, _ = buffers
    q_full, k_full, k_empty, v_full, _ = barriers
    _, _, _, first, tokens, _ = where
    n_whole, n_near, n_rest, n_listed, _ = steps
    out_ptr, lse_ptr, out_stride_n = out
    KEY_STAGES: gl.constexpr = k_ring.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    line = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    threshold = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    if GATE != "straight":
        threshold = gl.load(threshold_ptr + first + line, mask=first + line < tokens, other=0.0)

    mbarrier.wait(q_full, 0)
    q = q_bufs.index(W).reshape([HALF, D])
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[product(q, k_ring, 0, TILE, D, KEY_STAGES)])
    s = seen_or(seen_ring.index(0), s, line, True)
    mbarrier.arrive(k_empty.index(0), count=1)
    peak = gl.full([HALF], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    peak, _, weights = softmax_step(s, peak, to_log2)
    total = partial_sums(weights)
    p = round_pack(weights, dtype)
    alpha = gl.full([HALF], 1.0, gl.float32, gl.SliceLayout(1, O_LAYOUT))
    o = gl.zeros([HALF, D], gl.float32, O_LAYOUT)
    operands = (q, buffers, barriers, n_near, line, threshold, to_log2)
    for step in range(1, 1 + n_whole):
        peak, total, p, alpha, o = _advance(peak, total, p, alpha, o, operands, step, False, False, "straight", D)
    for step in range(1 + n_whole, n_near + n_rest):
        peak, total, p, alpha, o = _advance(peak, total, p, alpha, o, operands, step, True, True, GATE, D)
    for step in range(n_near + n_rest, n_near + n_listed):
        peak, total, p, alpha, o = _advance(peak, total, p, alpha, o, operands, step, False, True, GATE, D)
    o = o * alpha[:, None]
    left = unpack(p, dtype, P_LAYOUT)
    next_o = _values(left, o, v_ring, v_full, n_near + n_listed - 1, n_near, True, D)
    o, left = warpgroup_mma_wait(0, deps=[next_o, left])

    whole = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, O_LAYOUT))
    peak = gl.convert_layout(peak, gl.SliceLayout(1, O_LAYOUT))
    o = o * (1.0 / whole)[:, None]
    row = first + W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, O_LAYOUT))
    gl.store(lse_ptr + row, (peak * to_log2 + gl.log2(whole)) * LN2, mask=row < tokens)
    store_rows(out_ptr, o, first + W * HALF, out_stride_n, tokens, O_LAYOUT)


@gluon.jit(do_not_specialize=["tokens", "window", "tiles", "lists", "capacity", "kv_heads", "group"])
def selected_fwd_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
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
    out_stride_b,
    out_stride_h,
    out_stride_n,
    tokens,
    window,
    tiles,
    capacity,
    kv_heads,
    group,
    to_log2,
    SHARED_SELECTION: gl.constexpr,
    GATE: gl.constexpr,
    PACKED: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):
    """Grid: the heads of a group fastest, then KV heads, tiles and the batch: few tiles at once read the same keys.
    ``to_log2`` is the scale in units of log2. Tile descriptors are of ``[1, 1, 64, D]`` queries and ``[1, 1, 128, D]``
    keys and values. Lists are filled up to whole tiles."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    batch, kv_head, head, tile, selection = tile_of_program(tiles, kv_heads, group, SHARED_SELECTION)
    first = tile * TILE
    n_whole, n_edge = neighbours(first, tokens, window, doc_start_ptr, TILE, PACKED)
    place = selection * tiles + tile
    keys_ptr += place * capacity
    seen_ptr += place * capacity
    listed = gl.load(counts_ptr + place)
    whole = gl.load(whole_ptr + place) // TILE * TILE
    n_rest = (listed - whole + TILE - 1) // TILE
    steps = (n_whole, 1 + n_whole + n_edge, n_rest, whole // TILE + n_rest, whole)

    q_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [KEY_STAGES, 1, 1, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [VALUE_STAGES, 1, 1, TILE, D], v_desc.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    seen_ring = gl.allocate_shared_memory(gl.int32, [KEY_STAGES, TILE], FLAT)
    score_ring = gl.allocate_shared_memory(gl.float32, [KEY_STAGES, TILE], FLAT)
    index_ring = gl.allocate_shared_memory(gl.int32, [2, TILE], FLAT)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2 * KEY_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2 * VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    init_barriers(k_full, k_empty, KEY_STAGES)
    init_barriers(v_full, v_empty, VALUE_STAGES)
    fence_async_shared()

    wide_batch = batch.to(gl.int64)
    wide_head = kv_head.to(gl.int64)
    key_ptr += wide_batch * key_stride_b + wide_head * key_stride_h
    value_ptr += wide_batch * value_stride_b + wide_head * value_stride_h
    scores_ptr += selection * tokens
    threshold_ptr += selection * tokens
    out_ptr += wide_batch * out_stride_b + head.to(gl.int64) * out_stride_h
    lse_ptr += (batch * kv_heads * group + head).to(gl.int64) * tokens
    sources = (key_ptr, value_ptr, key_stride_n, value_stride_n, keys_ptr, seen_ptr, scores_ptr, doc_end_ptr)
    buffers = (q_bufs, k_ring, v_ring, seen_ring, score_ring, index_ring)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    where = (batch, head, kv_head, first, tokens, window)
    out = (out_ptr, lse_ptr, out_stride_n)
    gl.warp_specialize(
        [
            (
                _producer,
                ((q_desc, k_desc, v_desc), sources, buffers, barriers, where, steps, D, GATE, PACKED),
            ),
            (_consumer, (0, buffers, barriers, where, steps, threshold_ptr, out, to_log2, D, GATE)),
            (_consumer, (1, buffers, barriers, where, steps, threshold_ptr, out, to_log2, D, GATE)),
        ],
        [4, 4],
        [240, 240],
    )
