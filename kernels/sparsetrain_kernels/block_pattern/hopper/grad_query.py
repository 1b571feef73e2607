"""The gradient of queries. One program per 128 query rows of one head, over the key tiles of the forward kernel: a
producer warp, and two consumer warpgroups of 64 rows each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsetrain_kernels.block_pattern.hopper.geometry import (
    HALF,
    TILE,
    acquire,
    exp2,
    key_list,
    key_tile_at,
    place,
    product,
    read_item,
    store_rows,
    tma_load,
)


@gluon.jit
def _load_tile(
    k_desc, v_desc, rings, full, empty, batch, kv_head, row, step, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Bring in the 128 keys and values from ``row`` on, ``BLOCK_N`` a slot. Returns the next step."""
    k_ring, v_ring = rings
    D: gl.constexpr = k_desc.block_type.shape[3]
    for part in gl.static_range(TILE // BLOCK_N):
        slot = step % STAGES
        bar = acquire(full, empty, step, STAGES, BLOCK_N * D * 4)
        tma_load(k_desc, [batch, kv_head, row + part * BLOCK_N, 0], bar, k_ring.index(slot))
        tma_load(v_desc, [batch, kv_head, row + part * BLOCK_N, 0], bar, v_ring.index(slot))
        step += 1
    return step


@gluon.jit
def _producer(
    descriptors,
    q_bufs,
    do_bufs,
    rings,
    barriers,
    far_ptr,
    batch,
    head,
    kv_head,
    document,
    tile,
    keys,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TPB: gl.constexpr,
):
    q_desc, k_desc, v_desc, do_desc = descriptors
    q_full, full, empty = barriers
    n_sink, n_far, first, n_full = keys
    D: gl.constexpr = q_desc.block_type.shape[3]
    mbarrier.expect(q_full, TILE * D * 4)
    for w in gl.static_range(2):
        row = document + tile * TILE + w * HALF
        tma_load(q_desc, [batch, head, row, 0], q_full, q_bufs.index(w))
        tma_load(do_desc, [batch, head, row, 0], q_full, do_bufs.index(w))
    step = _load_tile(
        k_desc, v_desc, rings, full, empty, batch, kv_head, document + tile * TILE, tile * 0, BLOCK_N, STAGES
    )
    for i in range(n_full):
        row = document + key_tile_at(far_ptr, i, tile, n_sink, n_far, first, TPB) * TILE
        step = _load_tile(k_desc, v_desc, rings, full, empty, batch, kv_head, row, step, BLOCK_N, STAGES)


@gluon.jit
def _step(
    s,
    dp,
    dq,
    q,
    do,
    lse,
    delta,
    rings,
    full,
    empty,
    step,
    last,
    to_log2,
    MASKED: gl.constexpr,
    W: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``BLOCK_N`` keys against the 64 queries of this warpgroup. As in the kernel of keys and values: arrives with S of
    this step done and dP in flight, and leaves so for the next one. The next S is issued before this step's dS, which
    then has it to hide behind."""
    k_ring, v_ring = rings
    dtype: gl.constexpr = k_ring.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot = step % STAGES
    k = k_ring.index(slot).reshape([BLOCK_N, D])
    p = exp2(s * to_log2 - gl.expand_dims(lse, 1))
    if MASKED:
        query = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
        key = (step % (TILE // BLOCK_N)) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        p = gl.where(gl.expand_dims(query, 1) >= gl.expand_dims(key, 0), p, 0.0)
    mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step < last)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    s = product(q, k_ring, step + 1, BLOCK_N, D, STAGES)
    ds = p * (dp - gl.expand_dims(delta, 1))
    left = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, D_LAYOUT, 2))
    dq = warpgroup_mma(left, k, dq, is_async=True)
    dp = product(do, v_ring, step + 1, BLOCK_N, D, STAGES)
    s, dq = warpgroup_mma_wait(1, deps=(s, dq))
    mbarrier.arrive(empty.index(slot))
    return s, dp, dq


@gluon.jit
def _consumer(
    q_bufs,
    do_bufs,
    rings,
    barriers,
    rows,
    scale,
    to_log2,
    W: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    k_ring, v_ring = rings
    q_full, full, empty = barriers
    lse_ptr, delta_ptr, dq_ptr, dq_stride_n, length, tile, n_full = rows
    PARTS: gl.constexpr = TILE // BLOCK_N
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row = tile * TILE + W * HALF
    line = row + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    n_steps = PARTS + n_full * PARTS
    lse = gl.load(lse_ptr + line)
    delta = gl.load(delta_ptr + line)
    mbarrier.wait(q_full, 0)
    # Queries stay in registers: read from shared memory in every step, they would leave its bandwidth for little else.
    q = q_bufs.index(W).reshape([HALF, D]).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
    do = do_bufs.index(W).reshape([HALF, D])
    dq = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    mbarrier.wait(full.index(0), 0)
    s = product(q, k_ring, 0, BLOCK_N, D, STAGES)
    dp = product(do, v_ring, 0, BLOCK_N, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    for part in gl.static_range(PARTS):  # unrolled: as a loop of two steps, ptxas serialises its products
        s, dp, dq = _step(
            s, dp, dq, q, do, lse, delta, rings, full, empty, part, n_steps - 1, to_log2, True, W, D, BLOCK_N, STAGES
        )
    for step in range(PARTS, n_steps):
        s, dp, dq = _step(
            s, dp, dq, q, do, lse, delta, rings, full, empty, step, n_steps - 1, to_log2, False, W, D, BLOCK_N, STAGES
        )
    warpgroup_mma_wait(0, deps=(dp,))
    store_rows(dq_ptr, dq * scale, row, dq_stride_n, length, D_LAYOUT)


@gluon.jit(do_not_specialize=["items", "heads", "together", "group", "window", "sinks", "period", "far_stride_h"])
def block_pattern_bwd_dq_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    far_ptr,
    items_ptr,
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
    items,
    heads,
    together,
    group,
    stats_rows,
    window,
    sinks,
    period,
    far_stride_h,
    scale,
    to_log2,
    TPB: gl.constexpr,
    FAR: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: the heads of a group fastest, then as :func:`place` says, the last and longest items first. Tile
    descriptors are of ``[1, 1, 64, D]`` queries and output gradients and ``[1, 1, BLOCK_N, D]`` keys and values."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    pid = gl.program_id(0)
    item, kv_head, batch = place(pid // group, items, heads // group, together)
    item = items - 1 - item
    head = kv_head * group + pid % group
    document, length, tile, _, padded = read_item(items_ptr, item)
    far_ptr += kv_head * far_stride_h + tile // TPB % period * FAR
    n_sink, n_far, first, n_full = key_list(far_ptr, tile, window, sinks, TPB, FAR)

    q_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], do_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    stats = (batch * heads + head).to(gl.int64) * stats_rows + padded * TPB * TILE
    dq_ptr += batch.to(gl.int64) * dq_stride_b + head.to(gl.int64) * dq_stride_h
    dq_ptr += document.to(gl.int64) * dq_stride_n
    rings = (k_ring, v_ring)
    barriers = (q_full, full, empty)
    rows = (lse_ptr + stats, delta_ptr + stats, dq_ptr, dq_stride_n, length, tile, n_full)
    gl.warp_specialize(
        [
            (
                _producer,
                (
                    (q_desc, k_desc, v_desc, do_desc),
                    q_bufs,
                    do_bufs,
                    rings,
                    barriers,
                    far_ptr,
                    batch,
                    head,
                    kv_head,
                    document,
                    tile,
                    (n_sink, n_far, first, n_full),
                    BLOCK_N,
                    STAGES,
                    TPB,
                ),
            ),
            (_consumer, (q_bufs, do_bufs, rings, barriers, rows, scale, to_log2, 0, D, BLOCK_N, STAGES)),
            (_consumer, (q_bufs, do_bufs, rings, barriers, rows, scale, to_log2, 1, D, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [240, 240],
    )
