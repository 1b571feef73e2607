"""The forward kernel. One program works on 128 query rows of one head in three partitions:

    producer     one warp: TMA loads of Q, K and V into rings of shared memory
    consumer 0   one warpgroup: query rows 0 to 63
    consumer 1   one warpgroup: query rows 64 to 127

A step is one tile of 128 keys; step 0 is the masked one. In a consumer the product Q K^T of the next step and the
product P V of the present one are in flight together, and the softmax of the next runs while P V still does, as in
FlashAttention-3 (2407.08608, section 3.2).
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
    acquire,
    exp2,
    key_list,
    key_tile_at,
    product,
    read_item,
    tma_load,
)

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _producer(
    descriptors,
    buffers,
    barriers,
    work,
    far_ptr,
    batch,
    head,
    kv_head,
    D: gl.constexpr,
    TPB: gl.constexpr,
    FAR: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_desc, k_desc, v_desc = descriptors
    q_bufs, k_ring, v_ring = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    document, _, tile, window, sinks = work
    BYTES: gl.constexpr = TILE * D * 2
    n_sink, n_far, first, n_full = key_list(far_ptr, tile, window, sinks, TPB, FAR)
    mbarrier.expect(q_full, BYTES)
    tma_load(q_desc, [batch, head, document + tile * TILE, 0], q_full, q_bufs.index(0))
    tma_load(q_desc, [batch, head, document + tile * TILE + HALF, 0], q_full, q_bufs.index(1))
    # The consumers read keys one step before values, so values are loaded one step later.
    row = document + tile * TILE
    bar = acquire(k_full, k_empty, 0, STAGES, BYTES)
    tma_load(k_desc, [batch, kv_head, row, 0], bar, k_ring.index(0))
    for step in range(n_full):
        value_row = row
        row = document + key_tile_at(far_ptr, step, tile, n_sink, n_far, first, TPB) * TILE
        bar = acquire(k_full, k_empty, step + 1, STAGES, BYTES)
        tma_load(k_desc, [batch, kv_head, row, 0], bar, k_ring.index((step + 1) % STAGES))
        bar = acquire(v_full, v_empty, step, STAGES, BYTES)
        tma_load(v_desc, [batch, kv_head, value_row, 0], bar, v_ring.index(step % STAGES))
    bar = acquire(v_full, v_empty, n_full, STAGES, BYTES)
    tma_load(v_desc, [batch, kv_head, row, 0], bar, v_ring.index(n_full % STAGES))


@gluon.jit
def partial_sums(p):
    """Row sums of what one thread holds, ``[64, 128]`` to ``[64, 4]``: no shuffle (8 columns a core matrix of the MMA,
    two neighbours a thread)."""
    x = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(x, axis=3), axis=1)


@gluon.jit
def round_pack(p, dtype: gl.constexpr):
    """fp32 ``[64, 128]`` to pairs of 16-bit floats in int32 ``[64, 64]``. The loop carries weights in this form: a
    16-bit tensor would be carried as halves of registers, taken apart and put together again in every step."""
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack(x, dtype: gl.constexpr, layout: gl.constexpr):
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.join(low, high).reshape([x.shape[0], x.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(p, layout, assert_trivial=True)


@gluon.jit
def softmax_step(s, peak, to_log2):
    """Scores and the old row maxima to the new maxima, the factor for what was summed so far, and the weights.

    The first step is the masked tile, in which every row sees itself: the maxima are finite."""
    new_peak = gl.maximum(peak, gl.max(s, axis=1))
    factor = exp2((peak - new_peak) * to_log2)
    return new_peak, factor, exp2(s * to_log2 - (new_peak * to_log2)[:, None])


@gluon.jit
def _values(p, o, v_ring, v_full, step, STAGES: gl.constexpr, D: gl.constexpr):
    slot = step % STAGES
    mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
    return warpgroup_mma(p, v_ring.index(slot).reshape([TILE, D]), o, is_async=True)


@gluon.jit
def _consumer(
    W: gl.constexpr,
    buffers,
    barriers,
    work,
    far_ptr,
    out,
    to_log2,
    D: gl.constexpr,
    TPB: gl.constexpr,
    FAR: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_bufs, k_ring, v_ring = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    _, length, tile, window, sinks = work
    out_ptr, lse_ptr, out_stride_n = out
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    _, _, _, n_full = key_list(far_ptr, tile, window, sinks, TPB, FAR)

    mbarrier.wait(q_full, 0)
    q = q_bufs.index(W).reshape([HALF, D])
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[product(q, k_ring, 0, TILE, D, STAGES)])
    mbarrier.arrive(k_empty.index(0), count=1)
    line = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    column = gl.arange(0, TILE, gl.SliceLayout(0, S_LAYOUT))
    s = gl.where(line[:, None] >= column[None, :], s, -float("inf"))
    peak = gl.full([HALF], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    peak, factor, weights = softmax_step(s, peak, to_log2)
    total = partial_sums(weights)
    p = round_pack(weights, dtype)
    alpha = gl.full([HALF], 1.0, gl.float32, gl.SliceLayout(1, O_LAYOUT))
    o = gl.zeros([HALF, D], gl.float32, O_LAYOUT)

    # peak, total and p include the present step. o does not yet, and waits for the factor alpha: it is rescaled behind
    # the issue of the next Q K^T.
    for step in range(n_full):
        slot = (step + 1) % STAGES
        mbarrier.wait(k_full.index(slot), ((step + 1) // STAGES) & 1)
        next_s = product(q, k_ring, step + 1, TILE, D, STAGES)
        o = o * alpha[:, None]
        left = unpack(p, dtype, P_LAYOUT)
        next_o = _values(left, o, v_ring, v_full, step, STAGES, D)
        s = warpgroup_mma_wait(1, deps=[next_s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        peak, factor, weights = softmax_step(s, peak, to_log2)
        total = total * gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout))[:, None] + partial_sums(weights)
        p = round_pack(weights, dtype)
        alpha = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))
        # Long complete. It ends a basic block, which keeps ptxas from moving the softmax behind the wait below.
        mbarrier.wait(q_full, 0)
        o, left, p, total = warpgroup_mma_wait(0, deps=[next_o, left, p, total])
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)
    o = o * alpha[:, None]
    left = unpack(p, dtype, P_LAYOUT)
    next_o = _values(left, o, v_ring, v_full, n_full, STAGES, D)
    o, left = warpgroup_mma_wait(0, deps=[next_o, left])

    row = tile * TILE + W * HALF
    whole = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, O_LAYOUT))
    peak = gl.convert_layout(peak, gl.SliceLayout(1, O_LAYOUT))
    o = o * (1.0 / whole)[:, None]
    line = row + gl.arange(0, HALF, gl.SliceLayout(1, O_LAYOUT))
    gl.store(lse_ptr + line, (peak * to_log2 + gl.log2(whole)) * LN2, mask=line < length)
    THREADS: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    o = gl.convert_layout(o.to(out_ptr.dtype.element_ty), layout)
    line = row + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    cells = (line.to(gl.int64) * out_stride_n)[:, None] + column[None, :]
    gl.store(out_ptr + cells, o, mask=(line < length)[:, None])


# Sizes are not specialised: a size of 1 must not become a constant of another type, nor a new size a new compilation.
@gluon.jit(do_not_specialize=["items", "kv_heads", "rows", "window", "sinks", "period", "far_stride_h"])
def block_pattern_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    far_ptr,
    items_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    items,
    kv_heads,
    rows,
    window,
    sinks,
    period,
    far_stride_h,
    to_log2,
    GROUP: gl.constexpr,
    TPB: gl.constexpr,
    FAR: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: the heads of a group fastest, then items, KV heads and the batch. ``to_log2`` is the scale in units of
    log2. Tile descriptors are of ``[1, 1, 64, D]`` queries and ``[1, 1, 128, D]`` keys and values."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    pid = gl.program_id(0)
    item = pid // GROUP % items
    pair = pid // GROUP // items
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    head = kv_head * GROUP + pid % GROUP
    document, length, tile, _, _ = read_item(items_ptr, item)
    far_ptr += kv_head * far_stride_h + tile // TPB % period * FAR

    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, HALF, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, TILE, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    out_ptr += batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    out_ptr += document.to(gl.int64) * out_stride_n
    lse_ptr += (batch * kv_heads * GROUP + head).to(gl.int64) * rows + document
    buffers = (q_bufs, k_ring, v_ring)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    work = (document, length, tile, window, sinks)
    out = (out_ptr, lse_ptr, out_stride_n)
    gl.warp_specialize(
        [
            (_consumer, (0, buffers, barriers, work, far_ptr, out, to_log2, D, TPB, FAR, STAGES)),
            (_consumer, (1, buffers, barriers, work, far_ptr, out, to_log2, D, TPB, FAR, STAGES)),
            (
                _producer,
                ((q_desc, k_desc, v_desc), buffers, barriers, work, far_ptr, batch, head, kv_head, D, TPB, FAR, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
