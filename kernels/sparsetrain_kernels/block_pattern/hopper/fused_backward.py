"""All three gradients in one kernel, with five products a tile instead of seven. One program per 128 keys of a KV head,
over the query tiles that read them and all heads of the group, in four partitions:

    consumers 0, 1   one warpgroup each: 64 of the keys
    producer         one warp: TMA loads of queries, output gradients and row statistics into rings
    storer           one warp: TMA reductions that add the tile's part of dQ to a sum of integers in global memory

Keys stay, so that dK and dV add up in registers; dQ, which every key tile has a part of, adds up in memory. The parts
are integers (see ``triton/fixed_point.py``), whose sum does not depend on the order in which programs send them.

Scores are formed keys by queries, as in the kernel of keys and values: P and dS feed dV and dK from registers. For dQ
both consumers leave their dS in shared memory, and each makes one half of its columns from all 128 keys.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsetrain_kernels.block_pattern.hopper.geometry import (
    HALF,
    TILE,
    exp2,
    place,
    query_list,
    read_item,
    store_rows,
    tile_product,
    tma_load,
)
from sparsetrain_kernels.block_pattern.hopper.query_tiles import each_query_tile, load_query_tile

LN2 = gl.constexpr(0.6931471805599453)


@builtin
def _reduce_add(tensor_desc, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


# Triton 3.6 and 3.7 have the instruction, but no function for it.
tma_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add


@gluon.jit
def _both_consumers():
    """A barrier of the two consumers. Triton itself uses those of low numbers."""
    zero = gl.program_id(0) * 0
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _to_integer(x):
    return gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _program_id():
    """The program's number, read anew, where a register to keep it in would be one too many."""
    zero = gl.program_id(0) * 0
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x; // $1", "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _producer(
    kv_descriptors,
    descriptors,
    lines,
    kv_buffers,
    rings,
    line_rings,
    barriers,
    far_ptr,
    where,
    columns,
    TPB: gl.constexpr,
):
    k_desc, v_desc = kv_descriptors
    k_buf, v_buf = kv_buffers
    kv_full, full, empty = barriers
    batch, kv_head, _, _, document, _, _, tile = where
    D: gl.constexpr = k_desc.block_type.shape[3]
    mbarrier.expect(kv_full, TILE * D * 4)
    tma_load(k_desc, [batch, kv_head, document + tile * TILE, 0], kv_full, k_buf)
    tma_load(v_desc, [batch, kv_head, document + tile * TILE, 0], kv_full, v_buf)
    state = (descriptors, lines, rings, line_rings, full, empty)
    each_query_tile(load_query_tile, state, far_ptr, where, columns, TPB)


@gluon.jit
def _send_tile(state, batch, head, row, padded_row, step):
    """Add dQ of 128 rows, as the consumers leave it step by step, each its half of the columns."""
    dq_desc, dq_bufs, dq_full, dq_empty = state
    BLOCK_M: gl.constexpr = dq_bufs.shape[3]
    COLUMNS: gl.constexpr = dq_bufs.shape[4]
    for part in gl.static_range(TILE // BLOCK_M):
        for w in gl.static_range(2):
            mbarrier.wait(dq_full.index(w), step & 1)
            tma_add(dq_desc, [batch, head, row + part * BLOCK_M, w * COLUMNS], dq_bufs.index(w))
        for w in gl.static_range(2):
            tma.store_wait(1 - w)
            mbarrier.arrive(dq_empty.index(w), count=1)
        step += 1
    return step


@gluon.jit
def _storer(dq_desc, dq_bufs, dq_barriers, far_ptr, where, columns, TPB: gl.constexpr):
    dq_full, dq_empty = dq_barriers
    each_query_tile(_send_tile, (dq_desc, dq_bufs, dq_full, dq_empty), far_ptr, where, columns, TPB)
    tma.store_wait(0)


@gluon.jit
def _consumer(
    buffers,
    barriers,
    dq_barriers,
    out,
    n_masked,
    n_steps,
    to_log2,
    W: gl.constexpr,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """64 keys against all query tiles, ``BLOCK_M`` queries a step. There is one loop, not a masked one and a steady
    one: registers are so short that whatever a second copy of the step keeps alive is spilled.

    Of the five products S and dP are in flight together, then dV, then dQ and dK; the exponentials hide behind dP, dS
    behind dV, and the rounding of dQ behind dK. Two buffers of dS suffice: whoever passes the barrier of a step has
    waited for the products of the step before, which were the last to read the other buffer.
    """
    kv_buffers, rings, line_rings, ds_bufs, dq_bufs = buffers
    k_buf, v_buf = kv_buffers
    q_ring, do_ring = rings
    lse_ring, delta_ring, scale_ring = line_rings
    kv_full, full, empty = barriers
    dq_full, dq_empty = dq_barriers
    COLUMNS: gl.constexpr = D // 2
    dtype: gl.constexpr = k_buf.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, D_LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    keys = k_buf.reshape([TILE, D])
    k = keys.slice(W * HALF, HALF, dim=0)
    k_columns = keys.slice(W * COLUMNS, COLUMNS, dim=1)
    v = v_buf.reshape([TILE, D]).slice(W * HALF, HALF, dim=0)
    dq_buf = dq_bufs.index(W).reshape([BLOCK_M, COLUMNS])
    dk = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    dv = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    mbarrier.wait(kv_full, 0)
    slot = n_steps * 0
    turn = n_steps * 0
    for step in range(n_steps):
        q = q_ring.index(slot).reshape([BLOCK_M, D])
        do = do_ring.index(slot).reshape([BLOCK_M, D])
        mbarrier.wait(full.index(slot), turn)
        s_token = tile_product(k, q)
        dp = tile_product(v, do)
        s = warpgroup_mma_wait(1, deps=(s_token,))
        if step < n_masked:
            key = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
            query = step % (TILE // BLOCK_M) * BLOCK_M + gl.arange(0, BLOCK_M, QUERIES)
            s = gl.where(gl.expand_dims(query, 0) >= gl.expand_dims(key, 1), s, -float("inf"))
        p = exp2(s * to_log2 - gl.expand_dims(lse_ring.index(slot).load(QUERIES), 0))
        left = gl.convert_layout(p.to(dtype), LEFT)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        dv = warpgroup_mma(left, do, dv, is_async=True)
        ds = (p * (dp - gl.expand_dims(delta_ring.index(slot).load(QUERIES), 0))).to(dtype)
        ds_tile = ds_bufs.index(step % 2).reshape([TILE, BLOCK_M])
        ds_tile.slice(W * HALF, HALF, dim=0).store(ds)
        fence_async_shared()
        _both_consumers()
        zero = gl.zeros([BLOCK_M, COLUMNS], gl.float32, DQ_LAYOUT)
        dq_token = warpgroup_mma(ds_tile.permute((1, 0)), k_columns, zero, use_acc=False, is_async=True)
        right = gl.convert_layout(ds, LEFT)
        dk = warpgroup_mma(right, q, dk, is_async=True)
        dq, dv, left = warpgroup_mma_wait(1, deps=(dq_token, dv, left))
        mbarrier.wait(dq_empty.index(W), (step & 1) ^ 1)
        scale = scale_ring.index(slot).load(gl.SliceLayout(1, DQ_LAYOUT))
        dq_buf.store(_to_integer(dq * gl.expand_dims(scale, 1)))
        fence_async_shared()
        mbarrier.arrive(dq_full.index(W), count=1)
        dk, right = warpgroup_mma_wait(0, deps=(dk, right))
        mbarrier.arrive(empty.index(slot), count=1)
        # Counted, not divided: the remainder by 3 takes registers that are not there.
        is_last = slot == STAGES - 1
        slot = gl.where(is_last, 0, slot + 1)
        turn = gl.where(is_last, turn ^ 1, turn)
    dk = dk * (to_log2 * LN2)
    _store(dk, dv, out, W, D, D_LAYOUT, dtype)


@gluon.jit
def _store(dk, dv, out, W: gl.constexpr, D: gl.constexpr, D_LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Into the gradients or, for a chunk of a split sink tile, into the fp32 partial sums: one pair of registers for
    the addresses of either, worked out here, behind the loop."""
    dk_out, dv_out, work = out
    dk_ptr, dk_stride_b, dk_stride_h, dk_stride_n = dk_out
    dv_ptr, dv_stride_b, dv_stride_h, dv_stride_n = dv_out
    partial_ptr, items_ptr, items, split_items, kv_heads, together = work
    item, kv_head, batch = place(_program_id(), items, kv_heads, together)
    kv_head = kv_head.to(gl.int64)
    batch = batch.to(gl.int64)
    document, length, tile, piece, _ = read_item(items_ptr, item)
    start = (document + tile * TILE).to(gl.int64)
    dk_address = (dk_ptr + batch * dk_stride_b + kv_head * dk_stride_h + start * dk_stride_n).to(gl.int64)
    dv_address = (dv_ptr + batch * dv_stride_b + kv_head * dv_stride_h + start * dv_stride_n).to(gl.int64)
    rows = length - tile * TILE
    is_piece = piece >= 0
    if is_piece:
        at = ((batch * kv_heads + kv_head) * split_items + item) * (2 * TILE * D)
        dk_address = (partial_ptr + at).to(gl.int64)
        dv_address = (partial_ptr + (at + TILE * D)).to(gl.int64)
        dk_stride_n = D
        dv_stride_n = D
        rows = TILE
    row = W * HALF
    if is_piece:
        PARTIAL: gl.constexpr = gl.pointer_type(gl.float32)
        store_rows(dk_address.to(PARTIAL, bitcast=True), dk, row, dk_stride_n, rows, D_LAYOUT)
        store_rows(dv_address.to(PARTIAL, bitcast=True), dv, row, dv_stride_n, rows, D_LAYOUT)
    else:
        GRADIENT: gl.constexpr = gl.pointer_type(dtype)
        store_rows(dk_address.to(GRADIENT, bitcast=True), dk, row, dk_stride_n, rows, D_LAYOUT)
        store_rows(dv_address.to(GRADIENT, bitcast=True), dv, row, dv_stride_n, rows, D_LAYOUT)


@gluon.jit(
    do_not_specialize=[
        "items",
        "split_items",
        "kv_heads",
        "together",
        "group",
        "window",
        "sinks",
        "period",
        "far_stride_h",
        "chunk",
    ]
)
def block_pattern_bwd_fused_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    scale_desc,
    dq_desc,
    dk_ptr,
    dv_ptr,
    partial_ptr,
    far_ptr,
    items_ptr,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    items,
    split_items,
    kv_heads,
    together,
    group,
    stats_rows,
    window,
    sinks,
    period,
    far_stride_h,
    chunk,
    to_log2,
    TPB: gl.constexpr,
    FAR: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Work items and partial sums are those of the kernel of keys and values; ``to_log2``, the scale in units of log2,
    is positive. Tile descriptors are of ``[1, 1, BLOCK_M, D]`` queries and output gradients, ``[1, 1, 128, D]`` keys
    and values, ``[BLOCK_M]`` statistics and scales, and ``[1, 1, BLOCK_M, D / 2]`` integers."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    COLUMNS: gl.constexpr = D // 2
    dtype: gl.constexpr = k_desc.dtype
    item, kv_head, batch = place(gl.program_id(0), items, kv_heads, together)
    document, length, tile, piece, padded = read_item(items_ptr, item)
    far_ptr += kv_head * far_stride_h + tile // TPB % period * FAR
    columns = query_list(far_ptr, tile, piece, length, chunk, window, sinks, TPB, FAR)
    n_own, _, n_near, n_far = columns

    k_buf = gl.allocate_shared_memory(dtype, [1, 1, TILE, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [1, 1, TILE, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scale_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, TILE, BLOCK_M], dtype)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, TILE, BLOCK_M], DS)
    dq_bufs = gl.allocate_shared_memory(gl.int32, [2, 1, 1, BLOCK_M, COLUMNS], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()

    PARTS: gl.constexpr = TILE // BLOCK_M
    n_masked = n_own * group * PARTS
    n_steps = n_masked + (n_near + n_far) * group * PARTS
    kv_buffers = (k_buf, v_buf)
    rings = (q_ring, do_ring)
    line_rings = (lse_ring, delta_ring, scale_ring)
    barriers = (kv_full, full, empty)
    dq_barriers = (dq_full, dq_empty)
    where = (batch, kv_head, kv_heads, group, document, padded * TPB * TILE, stats_rows, tile)
    work = (partial_ptr, items_ptr, items, split_items, kv_heads, together)
    dk_out = (dk_ptr, dk_stride_b, dk_stride_h, dk_stride_n)
    dv_out = (dv_ptr, dv_stride_b, dv_stride_h, dv_stride_n)
    out = (dk_out, dv_out, work)
    buffers = (kv_buffers, rings, line_rings, ds_bufs, dq_bufs)
    gl.warp_specialize(
        [
            (
                _consumer,
                (buffers, barriers, dq_barriers, out, n_masked, n_steps, to_log2, 0, D, BLOCK_M, STAGES),
            ),
            (
                _consumer,
                (buffers, barriers, dq_barriers, out, n_masked, n_steps, to_log2, 1, D, BLOCK_M, STAGES),
            ),
            (
                _producer,
                (
                    (k_desc, v_desc),
                    (q_desc, do_desc),
                    (lse_desc, delta_desc, scale_desc),
                    kv_buffers,
                    rings,
                    line_rings,
                    barriers,
                    far_ptr,
                    where,
                    columns,
                    TPB,
                ),
            ),
            (_storer, (dq_desc, dq_bufs, dq_barriers, far_ptr, where, columns, TPB)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
