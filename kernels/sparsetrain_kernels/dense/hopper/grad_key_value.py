"""The gradient of keys and values. One program per 128 keys of a KV head, over the chosen rows that see them and all
heads of the group: a producer warp, and two consumer warpgroups of 64 keys each, as for patterns of blocks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from sparsetrain_kernels.block_pattern.hopper.geometry import HALF, TILE, acquire, product, store_rows, tma_load
from sparsetrain_kernels.block_pattern.hopper.grad_key_value import LN2, key_value_step

ALIGNED = gl.constexpr(4)
"""TMA faults where the first number that it reads does not lie at a multiple of 16 bytes: rows that are loaded together
begin at a multiple of so many."""


@gluon.jit
def _masked_rows(masked, i, BLOCK_M: gl.constexpr):
    """The first row of a head's masked step ``i``, and the row past its last: steps before the whole tiles of rows, and
    then one of the few rows behind them."""
    first, n_front, front_end, tail, tail_end = masked
    is_front = i < n_front
    return gl.where(is_front, first + i * BLOCK_M, tail), gl.where(is_front, front_end, tail_end)


@gluon.jit
def _producer(descriptors, lines, buffers, barriers, start, where):
    """Keys and values, then step by step the rows: those that need a mask of every head, then the others head by head.
    The consumers count the same steps."""
    q_desc, k_desc, v_desc, do_desc = descriptors
    lse_desc, delta_desc = lines
    k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring = buffers
    kv_full, full, empty = barriers
    batch, kv_head, kv_heads, group, padded_rows, masked, n_masked, whole, n_whole = where
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    mbarrier.expect(kv_full, TILE * D * 4)
    for w in gl.static_range(2):
        tma_load(k_desc, [batch, kv_head, start + w * HALF, 0], kv_full, k_buf.index(w))
        tma_load(v_desc, [batch, kv_head, start + w * HALF, 0], kv_full, v_buf.index(w))
    for step in range(group * (n_masked + n_whole)):
        rest = step - group * n_masked
        member = gl.where(rest < 0, step // gl.maximum(n_masked, 1), rest // gl.maximum(n_whole, 1))
        row, _ = _masked_rows(masked, step - member * n_masked, BLOCK_M)
        if rest >= 0:
            row = whole + (rest - member * n_whole) * BLOCK_M
        head = kv_head * group + member
        line = (batch * kv_heads * group + head) * padded_rows + row
        slot = step % STAGES
        bar = acquire(full, empty, step, STAGES, BLOCK_M * D * 4 + BLOCK_M * 8)
        tma_load(q_desc, [batch, head, row, 0], bar, q_ring.index(slot))
        tma_load(lse_desc, [line], bar, lse_ring.index(slot))
        tma_load(do_desc, [batch, head, row, 0], bar, do_ring.index(slot))
        tma_load(delta_desc, [line], bar, delta_ring.index(slot))


@gluon.jit
def _by_position(where, p, step, W: gl.constexpr, BLOCK_M: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The weights of those of the 64 keys that each row of a masked step sees."""
    positions_ptr, start, masked, n_masked = where
    row, end = _masked_rows(masked, step % n_masked, BLOCK_M)
    key = start + W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
    row += gl.arange(0, BLOCK_M, gl.SliceLayout(0, S_LAYOUT))
    position = gl.load(positions_ptr + row, mask=row < end, other=-1)
    return gl.where(gl.expand_dims(position, 0) >= gl.expand_dims(key, 1), p, 0.0)


@gluon.jit
def _consumer(
    buffers, barriers, out, where, n_masked, n_steps, to_log2, W: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr
):
    k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring = buffers
    kv_full, full, empty = barriers
    dk_ptr, dv_ptr, dk_stride, dv_stride, start, keys, farthest = out
    STAGES: gl.constexpr = q_ring.shape[0]
    D_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    k = k_buf.index(W).reshape([HALF, D])
    v = v_buf.index(W).reshape([HALF, D])
    operands = (k, v, (q_ring, do_ring), (lse_ring, delta_ring), full, empty)
    dk = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    dv = gl.zeros([HALF, D], gl.float32, D_LAYOUT)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0, pred=n_steps > 0)
    s = product(k, q_ring, 0, BLOCK_M, D, STAGES)
    dp = product(v, do_ring, 0, BLOCK_M, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    for step in range(n_masked):
        s, dp, dk, dv, _ = key_value_step(
            s, dp, dk, dv, operands, step, n_steps, to_log2, _by_position, where, True, W, BLOCK_M, STAGES
        )
    for step in range(n_masked, n_steps):
        s, dp, dk, dv, _ = key_value_step(
            s, dp, dk, dv, operands, step, n_steps, to_log2, _by_position, where, False, W, BLOCK_M, STAGES
        )
    warpgroup_mma_wait(0, deps=(dp,))
    # A key that no row sees may be NaN.
    key = start + W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, D_LAYOUT))
    dk = gl.where(gl.expand_dims(key <= farthest, 1), dk * (to_log2 * LN2), 0.0)
    store_rows(dk_ptr, dk, W * HALF, dk_stride, keys, D_LAYOUT)
    store_rows(dv_ptr, dv, W * HALF, dv_stride, keys, D_LAYOUT)


@gluon.jit(do_not_specialize=["padded_rows", "key_tiles", "kv_heads", "group"])
def causal_rows_bwd_dkv_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    grad_key_ptr,
    grad_value_ptr,
    positions_ptr,
    key_tiles_ptr,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    padded_rows,
    key_tiles,
    kv_heads,
    group,
    to_log2,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The numbers of a key tile are those of the plain Triton kernel. Grid: key tiles fastest, the first keys, which
    most rows see, first; then KV heads, so that their rows stay in L2, then the batch. Tile descriptors are of ``[1, 1,
    BLOCK_M, D]`` queries and output gradients, ``[1, 1, 64, D]`` keys and values, and ``[BLOCK_M]`` statistics, of
    which each head has ``padded_rows``, a multiple of 4."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    key_tile = gl.program_id(0) % key_tiles
    kv_head = gl.program_id(0) // key_tiles % kv_heads
    batch = gl.program_id(0) // key_tiles // kv_heads
    key_tiles_ptr += key_tile * 5
    start = gl.load(key_tiles_ptr)
    end = gl.load(key_tiles_ptr + 1)
    seen_from = gl.load(key_tiles_ptr + 2)
    # Every partition goes through the steps of an empty tile too: there are none.
    last = gl.where(start < end, gl.load(key_tiles_ptr + 4), seen_from)
    # Whole tiles of rows lie as far back as can be, behind all that need a mask. Without any, one stretch is masked.
    tail = last // ALIGNED * ALIGNED
    n_whole = gl.maximum(tail - gl.load(key_tiles_ptr + 3), 0) // BLOCK_M
    whole = tail - n_whole * BLOCK_M
    first = seen_from // ALIGNED * ALIGNED
    front_end = gl.where(n_whole > 0, whole, last)
    n_front = gl.where(seen_from < front_end, (front_end - first + BLOCK_M - 1) // BLOCK_M, 0)
    n_masked = n_front + ((n_whole > 0) & (tail < last)).to(gl.int32)

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
    wide = start.to(gl.int64)
    grad_key_ptr += wide_batch * grad_key_stride_b + wide_head * grad_key_stride_h + wide * grad_key_stride_n
    grad_value_ptr += wide_batch * grad_value_stride_b + wide_head * grad_value_stride_h + wide * grad_value_stride_n
    farthest = gl.load(positions_ptr + last - 1, mask=seen_from < last, other=-1)
    out = (grad_key_ptr, grad_value_ptr, grad_key_stride_n, grad_value_stride_n, start, end - start, farthest)
    buffers = (k_buf, v_buf, q_ring, do_ring, lse_ring, delta_ring)
    barriers = (kv_full, full, empty)
    masked = (first, n_front, front_end, tail, last)
    masks = (positions_ptr, start, masked, n_masked)
    steps = (n_masked * group, (n_masked + n_whole) * group)
    where = (batch, kv_head, kv_heads, group, padded_rows, masked, n_masked, whole, n_whole)
    gl.warp_specialize(
        [
            (
                _producer,
                ((q_desc, k_desc, v_desc, do_desc), (lse_desc, delta_desc), buffers, barriers, start, where),
            ),
            (_consumer, (buffers, barriers, out, masks, steps[0], steps[1], to_log2, 0, D, BLOCK_M)),
            (_consumer, (buffers, barriers, out, masks, steps[0], steps[1], to_log2, 1, D, BLOCK_M)),
        ],
        [4, 4],
        [240, 240],
    )
