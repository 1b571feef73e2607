"""The gradient of keys and values. One program per 128 keys of a KV head, over the query tiles that read them and all
heads of the group: a producer warp, and two consumer warpgroups of 64 keys each.

Scores are formed keys by queries, which makes the weights the left operand of the products that follow: they go from
accumulator registers straight back into the tensor cores, and no accumulator is ever transposed.
"""

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
    exp2,
    place,
    product,
    query_list,
    read_item,
    store_rows,
    tma_load,
)
from sparsetrain_kernels.block_pattern.hopper.query_tiles import each_query_tile, load_query_tile

LN2 = gl.constexpr(0.6931471805599453)


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
    for w in gl.static_range(2):
        tma_load(k_desc, [batch, kv_head, document + tile * TILE + w * HALF, 0], kv_full, k_buf.index(w))
        tma_load(v_desc, [batch, kv_head, document + tile * TILE + w * HALF, 0], kv_full, v_buf.index(w))
    state = (descriptors, lines, rings, line_rings, full, empty)
    each_query_tile(load_query_tile, state, far_ptr, where, columns, TPB)


@gluon.jit
def not_later(where, p, step, W: gl.constexpr, BLOCK_M: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The weights of those of the 64 keys that each query of a step sees, keys by queries: on the diagonal, of those
    that are not later."""
    key = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    query = (step % (TILE // BLOCK_M)) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, S_LAYOUT))
    return gl.where(gl.expand_dims(query, 0) >= gl.expand_dims(key, 1), p, 0.0)


@gluon.jit
def as_they_are(where, p, slot, RULE: gl.constexpr):
    """Weights as values are summed with them: those of the softmax."""
    return p


@gluon.jit
def softmax_gradient(where, p, dp, delta_ring, slot, sums, RULE: gl.constexpr):
    """The gradient of the logits, and of what else depends on them: of nothing."""
    delta = delta_ring.index(slot).load(gl.SliceLayout(0, p.type.layout))
    return p * (dp - gl.expand_dims(delta, 0)), sums


@gluon.jit
def key_value_step(
    s,
    dp,
    dk,
    dv,
    operands,
    step,
    n_steps,
    to_log2,
    visible: gl.constexpr,
    where,
    MASKED: gl.constexpr,
    W: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    weigh: gl.constexpr = as_they_are,
    gradient: gl.constexpr = softmax_gradient,
    RULE: gl.constexpr = None,
    sums=0,
):
    """``BLOCK_M`` queries against the 64 keys of this warpgroup. Arrives with S of this step done and dP in flight and
    leaves so for the next one (past the last, both are of whatever lies in the slot, and unused). ``operands`` are the
    keys, the values, the rings, and their barriers; ``visible`` leaves the weights of what a masked step sees, from
    ``where``. ``weigh`` and ``gradient`` are for weights that have gates, by a ``RULE``; ``sums`` is what the latter
    adds up.

    Products complete in the order of issue, dV dK S' dP' in each step; a wait names how many of the later ones may
    still run. The exponentials hide behind dP, and dS behind dV. ptxas serialises every product of the kernel if one
    with its left operand in registers crosses the end of the step, or if what crosses is not waited for with 0.
    """
    k, v, rings, line_rings, full, empty = operands
    q_ring, do_ring = rings
    lse_ring, delta_ring = line_rings
    D: gl.constexpr = k.shape[1]
    dtype: gl.constexpr = k.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, D_LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)

    slot = step % STAGES
    q = q_ring.index(slot).reshape([BLOCK_M, D])
    do = do_ring.index(slot).reshape([BLOCK_M, D])
    lse = lse_ring.index(slot).load(QUERIES)
    p = exp2(s * to_log2 - gl.expand_dims(lse, 0))
    if MASKED:
        p = visible(where, p, step, W, BLOCK_M, S_LAYOUT)
    left = gl.convert_layout(weigh(where, p, slot, RULE).to(dtype), LEFT)
    mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < n_steps)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(left, do, dv, is_async=True)
    ds, sums = gradient(where, p, dp, delta_ring, slot, sums, RULE)
    dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), LEFT), q, dk, is_async=True)

    s = product(k, q_ring, step + 1, BLOCK_M, D, STAGES)
    dk, dv = warpgroup_mma_wait(1, deps=(dk, dv))
    mbarrier.arrive(empty.index(slot))
    dp = product(v, do_ring, step + 1, BLOCK_M, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    return s, dp, dk, dv, sums


@gluon.jit
def _consumer(
    kv_buffers,
    rings,
    line_rings,
    barriers,
    out,
    n_masked,
    n_steps,
    to_log2,
    W: gl.constexpr,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The addresses are of row 0 of the key tile, in the gradients or, for a chunk of a split sink tile, in the fp32
    partial sums: one pair of registers for either, since none can be spared here."""
    k_buf, v_buf = kv_buffers
    q_ring, do_ring = rings
    kv_full, full, empty = barriers
    dk_address, dv_address, dk_stride, dv_stride, rows, is_piece = out
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    k = k_buf.index(W).reshape([HALF, D])
    v = v_buf.index(W).reshape([HALF, D])
    operands = (k, v, rings, line_rings, full, empty)
    dk = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    dv = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0, pred=n_steps > 0)
    s = product(k, q_ring, 0, BLOCK_M, D, STAGES)
    dp = product(v, do_ring, 0, BLOCK_M, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    for step in range(n_masked):
        s, dp, dk, dv, _ = key_value_step(
            s, dp, dk, dv, operands, step, n_steps, to_log2, not_later, 0, True, W, BLOCK_M, STAGES
        )
    for step in range(n_masked, n_steps):
        s, dp, dk, dv, _ = key_value_step(
            s, dp, dk, dv, operands, step, n_steps, to_log2, not_later, 0, False, W, BLOCK_M, STAGES
        )
    warpgroup_mma_wait(0, deps=(dp,))
    dk = dk * (to_log2 * LN2)
    row = W * HALF
    if is_piece:
        PARTIAL: gl.constexpr = gl.pointer_type(gl.float32)
        store_rows(dk_address.to(PARTIAL, bitcast=True), dk, row, dk_stride, rows, D_LAYOUT)
        store_rows(dv_address.to(PARTIAL, bitcast=True), dv, row, dv_stride, rows, D_LAYOUT)
    else:
        GRADIENT: gl.constexpr = gl.pointer_type(k_buf.dtype)
        store_rows(dk_address.to(GRADIENT, bitcast=True), dk, row, dk_stride, rows, D_LAYOUT)
        store_rows(dv_address.to(GRADIENT, bitcast=True), dv, row, dv_stride, rows, D_LAYOUT)


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
def block_pattern_bwd_dkv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
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
    """Grid, work items and partial sums as in the plain Triton kernel. Tile descriptors are of ``[1, 1, BLOCK_M, D]``
    queries and output gradients, ``[1, 1, 64, D]`` keys and values, and ``[BLOCK_M]`` statistics."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    PARTS: gl.constexpr = TILE // BLOCK_M
    item, kv_head, batch = place(gl.program_id(0), items, kv_heads, together)
    document, length, tile, piece, padded = read_item(items_ptr, item)
    far_ptr += kv_head * far_stride_h + tile // TPB % period * FAR
    n_own, first, n_near, n_far = query_list(far_ptr, tile, piece, length, chunk, window, sinks, TPB, FAR)

    k_buf = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF, D], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    wide_batch = batch.to(gl.int64)
    wide_head = kv_head.to(gl.int64)
    row = (document + tile * TILE).to(gl.int64)
    dk_address = (dk_ptr + wide_batch * dk_stride_b + wide_head * dk_stride_h + row * dk_stride_n).to(gl.int64)
    dv_address = (dv_ptr + wide_batch * dv_stride_b + wide_head * dv_stride_h + row * dv_stride_n).to(gl.int64)
    rows = length - tile * TILE
    is_piece = piece >= 0
    if is_piece:
        part = ((wide_batch * kv_heads + wide_head) * split_items + item) * (2 * TILE * D)
        dk_address = (partial_ptr + part).to(gl.int64)
        dv_address = (partial_ptr + (part + TILE * D)).to(gl.int64)
        dk_stride_n = D
        dv_stride_n = D
        rows = TILE
    n_masked = n_own * group * PARTS
    n_steps = n_masked + (n_near + n_far) * group * PARTS

    rings = (q_ring, do_ring)
    line_rings = (lse_ring, delta_ring)
    barriers = (kv_full, full, empty)
    out = (dk_address, dv_address, dk_stride_n, dv_stride_n, rows, is_piece)
    gl.warp_specialize(
        [
            (
                _producer,
                (
                    (k_desc, v_desc),
                    (q_desc, do_desc),
                    (lse_desc, delta_desc),
                    (k_buf, v_buf),
                    rings,
                    line_rings,
                    barriers,
                    far_ptr,
                    (batch, kv_head, kv_heads, group, document, padded * TPB * TILE, stats_rows, tile),
                    (n_own, first, n_near, n_far),
                    TPB,
                ),
            ),
            (
                _consumer,
                ((k_buf, v_buf), rings, line_rings, barriers, out, n_masked, n_steps, to_log2, 0, D, BLOCK_M, STAGES),
            ),
            (
                _consumer,
                ((k_buf, v_buf), rings, line_rings, barriers, out, n_masked, n_steps, to_log2, 1, D, BLOCK_M, STAGES),
            ),
        ],
        [4, 4],
        [240, 240],
    )
