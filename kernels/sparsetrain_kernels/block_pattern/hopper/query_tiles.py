"""What the producers of the kernels that keep their keys have in common: the query tiles of a key tile, brought in one
after another for all heads of a group."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsetrain_kernels.block_pattern.hopper.geometry import TILE, acquire, query_tile_at, tma_load


@gluon.jit
def _load_tile(
    descriptors,
    lines,
    rings,
    line_rings,
    full,
    empty,
    batch,
    head,
    row,
    stats_row,
    step,
    LINES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Bring in the 128 queries from ``row`` on, ``BLOCK_M`` rows a slot. Returns the next step."""
    q_desc, do_desc = descriptors
    q_ring, do_ring = rings
    D: gl.constexpr = q_desc.block_type.shape[3]
    for part in gl.static_range(TILE // BLOCK_M):
        slot = step % STAGES
        bar = acquire(full, empty, step, STAGES, BLOCK_M * D * 4 + BLOCK_M * 4 * LINES)
        tma_load(q_desc, [batch, head, row + part * BLOCK_M, 0], bar, q_ring.index(slot))
        tma_load(lines[0], [stats_row + part * BLOCK_M], bar, line_rings[0].index(slot))
        tma_load(do_desc, [batch, head, row + part * BLOCK_M, 0], bar, do_ring.index(slot))
        for i in gl.static_range(1, LINES):
            tma_load(lines[i], [stats_row + part * BLOCK_M], bar, line_rings[i].index(slot))
        step += 1
    return step


@gluon.jit
def load_query_tiles(
    descriptors,
    lines,
    rings,
    line_rings,
    full,
    empty,
    far_ptr,
    batch,
    kv_head,
    kv_heads,
    group,
    document,
    padded,
    stats_rows,
    tile,
    columns,
    LINES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    TPB: gl.constexpr,
):
    """Steps, as the consumers count them: the masked tile of every head, then the other tiles head by head. ``lines``
    are descriptors of ``LINES`` row statistics, which come with the queries and output gradients."""
    n_own, first, n_near, n_far = columns
    step = tile * 0
    for member in range(group * n_own):
        head = kv_head * group + member
        stats = (batch * kv_heads * group + head) * stats_rows + padded
        row = tile * TILE
        step = _load_tile(
            descriptors,
            lines,
            rings,
            line_rings,
            full,
            empty,
            batch,
            head,
            document + row,
            stats + row,
            step,
            LINES,
            BLOCK_M,
            STAGES,
        )
    for member in range(group):
        head = kv_head * group + member
        stats = (batch * kv_heads * group + head) * stats_rows + padded
        for i in range(n_near + n_far):
            row = query_tile_at(far_ptr, i, tile, first, n_near, TPB) * TILE
            step = _load_tile(
                descriptors,
                lines,
                rings,
                line_rings,
                full,
                empty,
                batch,
                head,
                document + row,
                stats + row,
                step,
                LINES,
                BLOCK_M,
                STAGES,
            )
