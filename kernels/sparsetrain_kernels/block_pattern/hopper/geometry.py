"""What the Hopper kernels share: tile lists by integer arithmetic, TMA and ring buffers.

Tiles have 128 rows and divide the pattern's block into ``TPB``. In each kernel a producer warp turns steps into tiles
and brings them in through rings of shared-memory slots; two consumer warpgroups of 64 rows count the same steps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

# Triton 3.9 renamed it.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

TILE = gl.constexpr(128)
"""Rows of a tile, in queries and in keys."""
HALF = gl.constexpr(64)
"""Rows of one consumer warpgroup."""
ITEM = gl.constexpr(5)
"""Integers of a work item, see ``triton/geometry.py``."""


@gluon.jit
def read_item(items_ptr, item):
    """A work item: the document's first row, its length, the tile, the chunk or -1, its first padded block.

    An item of nothing to do becomes the first tile of a document without rows: every partition goes through its steps,
    on whatever is there, and nothing is stored.
    """
    items_ptr += item * ITEM
    tile = gl.load(items_ptr + 2)
    length = gl.where(tile < 0, 0, gl.load(items_ptr + 1))
    return gl.load(items_ptr), length, gl.maximum(tile, 0), gl.load(items_ptr + 3), gl.load(items_ptr + 4)


@gluon.jit
def place(pid, items, heads, together):
    """The item, head and batch of a program: ``together``, 1 or all, heads take turns, then items, then heads. The host
    chooses, see ``launch_order.py``."""
    item = pid // together % items
    head = pid // (together * items) % (heads // together) * together + pid % together
    return item, head, pid // (items * heads)


@gluon.jit
def count_far(far_ptr, reach, FAR: gl.constexpr):
    """How many far distances are at most ``reach``. They ascend, and most lists are short."""
    n = reach * 0
    while (n < FAR) & (gl.load(far_ptr + gl.minimum(n, FAR - 1)) <= reach):
        n += 1
    return n


@gluon.jit
def key_list(far_ptr, tile, window, sinks, TPB: gl.constexpr, FAR: gl.constexpr):
    """The unmasked key tiles of a query tile: how many of sinks, how many far, the first of the window, and all."""
    block = tile // TPB
    n_sink = gl.minimum(sinks, block)
    n_far = count_far(far_ptr, block - sinks, FAR) * TPB
    first = gl.maximum(n_sink, block - window + 1) * TPB
    n_sink *= TPB
    return n_sink, n_far, first, n_sink + n_far + tile - first


@gluon.jit
def key_tile_at(far_ptr, i, tile, n_sink, n_far, first, TPB: gl.constexpr):
    """The i-th of them."""
    far = i - n_sink
    key_tile = gl.where(far < 0, i, first + far - n_far)
    if (far >= 0) & (far < n_far):
        key_tile = (tile // TPB - gl.load(far_ptr + far // TPB)) * TPB + far % TPB
    return key_tile


@gluon.jit
def query_list(far_ptr, tile, piece, length, chunk, window, sinks, TPB: gl.constexpr, FAR: gl.constexpr):
    """The query tiles of a key tile: whether its own, masked one is among them (0 or 1), the first and the number of
    those next to it (for a sink, all; of a split one, those of its ``chunk``), and the number of far ones."""
    block = tile // TPB
    n_tiles = (length + TILE - 1) // TILE
    low = tile * 0
    high = n_tiles
    if piece >= 0:
        low = piece * chunk * TPB
        high = gl.minimum(low + chunk * TPB, n_tiles)
    n_own = ((tile >= low) & (tile < high)).to(gl.int32)
    n_far = tile * 0
    last = high
    if block >= sinks:
        # Only the last far block can be cut off by the end of the document.
        blocks = (n_tiles + TPB - 1) // TPB
        n_far = count_far(far_ptr, blocks - 1 - block, FAR)
        if n_far > 0:
            end = block + gl.load(far_ptr + n_far - 1) + 1
            n_far = n_far * TPB - gl.maximum(end * TPB - n_tiles, 0)
        last = gl.minimum(block + gl.minimum(window, blocks), blocks) * TPB
        last = gl.minimum(last, n_tiles)
    first = gl.maximum(tile + 1, low)
    return n_own, first, gl.maximum(last - first, 0), n_far


@gluon.jit
def query_tile_at(far_ptr, i, tile, first, n_near, TPB: gl.constexpr):
    """The i-th of the unmasked ones."""
    query_tile = first + i
    if i >= n_near:
        far = i - n_near
        query_tile = (tile // TPB + gl.load(far_ptr + far // TPB)) * TPB + far % TPB
    return query_tile


@gluon.jit
def product(left, ring, step, ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Issue ``left @ tile^T`` for ``left [64, D]`` and the ``[ROWS, D]`` tile of a step."""
    return tile_product(left, ring.index(step % STAGES).reshape([ROWS, D]))


@gluon.jit
def tile_product(left, tile):
    ROWS: gl.constexpr = tile.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    zero = gl.zeros([HALF, ROWS], gl.float32, layout)
    return warpgroup_mma(left, tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def exp2(x):
    """Powers below 2^-126 are 0: what makes them smaller numbers would take two more instructions an element."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def acquire(full, empty, step, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Wait until both consumers have left the slot of a step. Returns the barrier that its loads complete on."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    return full.index(slot)


@gluon.jit
def store_rows(ptr, x, row, stride, rows, LAYOUT: gl.constexpr):
    """Rows ``row ...`` of a ``[rows, D]`` matrix; those past its end are left alone."""
    line = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    cells = gl.expand_dims(line.to(gl.int64) * stride, 1) + gl.expand_dims(column, 0)
    mask = gl.expand_dims(line < rows, 1) & gl.expand_dims(column < x.shape[1], 0)
    gl.store(ptr + cells, x.to(ptr.dtype.element_ty), mask=mask)
