"""The query tiles of a key tile, one after another for all heads of a group: in what order every partition of the
kernels that keep their keys takes them, and how the producers bring them in."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsetrain_kernels.block_pattern.hopper.geometry import TILE, acquire, query_tile_at, tma_load


@gluon.jit
def each_query_tile(visit: gl.constexpr, state, far_ptr, where, columns, TPB: gl.constexpr):
    """Steps, as the consumers count them: the masked tile of every head, then the other tiles head by head. ``visit``
    takes the state, batch, head, first row, its place among the padded rows of all heads, and the step; it returns the
    next step."""
    batch, kv_head, kv_heads, group, document, padded, padded_rows, tile = where
    n_own, first, n_near, n_far = columns
    step = tile * 0
    for member in range(group * n_own):
        head = kv_head * group + member
        padded_row = (batch * kv_heads * group + head) * padded_rows + padded
        row = tile * TILE
        step = visit(state, batch, head, document + row, padded_row + row, step)
    for member in range(group):
        head = kv_head * group + member
        padded_row = (batch * kv_heads * group + head) * padded_rows + padded
        for i in range(n_near + n_far):
            row = query_tile_at(far_ptr, i, tile, first, n_near, TPB) * TILE
            step = visit(state, batch, head, document + row, padded_row + row, step)


@gluon.jit
def load_query_tile(state, batch, head, row, padded_row, step):
    """Bring in 128 queries, output gradients and row statistics, in as many slots as they fill. The state: descriptors
    of queries and output gradients and of the statistics, their rings, and the rings' barriers."""
    descriptors, lines, rings, line_rings, full, empty = state
    q_desc, do_desc = descriptors
    q_ring, do_ring = rings
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    LINES: gl.constexpr = len(lines)
    for part in gl.static_range(TILE // BLOCK_M):
        slot = step % STAGES
        bar = acquire(full, empty, step, STAGES, BLOCK_M * D * 4 + BLOCK_M * 4 * LINES)
        tma_load(q_desc, [batch, head, row + part * BLOCK_M, 0], bar, q_ring.index(slot))
        tma_load(lines[0], [padded_row + part * BLOCK_M], bar, line_rings[0].index(slot))
        tma_load(do_desc, [batch, head, row + part * BLOCK_M, 0], bar, do_ring.index(slot))
        for i in gl.static_range(1, LINES):
            tma_load(lines[i], [padded_row + part * BLOCK_M], bar, line_rings[i].index(slot))
        step += 1
    return step
