"""What the kernels over rows read, step by step, and how the producer brings it in.

A step is a tile of keys. First come neighbouring keys, by TMA: in the forward kernel those of the diagonal, then those
that every row of the tile sees, then those that not every row does. Then come the selected keys, gathered: first those
that not every row sees. Gathered rows arrive by ``cp.async``, on barriers of their own: a barrier of TMA counts bytes,
one of ``cp.async`` counts the producer's threads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from sparsetrain_kernels.block_pattern.hopper.geometry import TILE

# Triton 3.9 renamed them.
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
all_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

THREADS = gl.constexpr(128)
"""Of the producer."""
CHUNK = gl.constexpr(32)
"""Rows whose addresses the producer holds at once: it has few registers."""
SEEN_BITS = gl.constexpr(16)
"""Rows of a tile that see a key, as one integer: the first in the low bits, their number above them."""


@gluon.jit
def tile_of_program(tiles, kv_heads, group, SHARED_SELECTION: gl.constexpr):
    """Batch, KV head, query head, tile and, int64, selection. The heads of a group come fastest, then KV heads, tiles
    and the batch: few tiles at once read the same keys."""
    pid = gl.program_id(0)
    kv_head = pid // group % kv_heads
    tile = pid // (group * kv_heads) % tiles
    batch = pid // (group * kv_heads) // tiles
    selection = (batch * kv_heads + kv_head).to(gl.int64)
    if SHARED_SELECTION:
        selection = batch.to(gl.int64)
    return batch, kv_head, kv_head * group + pid % group, tile, selection


@gluon.jit
def neighbours(first, tokens, window, doc_start_ptr, KEYS: gl.constexpr, PACKED: gl.constexpr):
    """Tiles of ``KEYS`` neighbours before the rows ``first ... first + TILE - 1``, nearest first: how many every row
    sees, and how many more some rows see."""
    end = gl.minimum(first + TILE, tokens)
    low = gl.maximum(first - window + 1, 0)
    low_whole = gl.maximum(end - window, 0)
    if PACKED:
        low = gl.maximum(low, gl.load(doc_start_ptr + first))
        low_whole = gl.maximum(low_whole, gl.load(doc_start_ptr + end - 1))
    n_whole = gl.maximum(first - low_whole, 0) // KEYS
    return n_whole, gl.maximum(first - low + KEYS - 1, 0) // KEYS - n_whole


@gluon.jit
def wait_full(full, step, n_near, pred, STAGES: gl.constexpr):
    """Until the keys, or values, of a step are there; the first ``n_near`` steps are of neighbours."""
    listed = gl.maximum(step - n_near, 0)
    is_near = step < n_near
    barrier = gl.where(is_near, step % STAGES, STAGES + listed % STAGES)
    phase = gl.where(is_near, step // STAGES, listed // STAGES) & 1
    mbarrier.wait(full.index(barrier), phase, pred=pred)


@gluon.jit
def init_barriers(full, empty, STAGES: gl.constexpr):
    """``full`` has ``2 * STAGES`` of them."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(full.index(STAGES + i), count=THREADS)
        mbarrier.init(empty.index(i), count=2)


@gluon.jit
def seen_or(seen, x, line, INFINITE: gl.constexpr):
    """``x [lines, keys]`` where a line of the tile sees the key, else 0 or, ``INFINITE``, minus infinity; from the
    integers of the keys in shared memory."""
    bounds = seen.load(gl.SliceLayout(0, x.type.layout))
    enter = bounds & ((1 << SEEN_BITS) - 1)
    return where_among(x, line[:, None], enter[None, :], (bounds >> SEEN_BITS)[None, :], INFINITE)


@gluon.jit
def where_among(x, row, enter, count, INFINITE: gl.constexpr):
    """``x`` where ``row`` is one of ``count`` rows from ``enter`` on, else 0 or minus infinity. By one comparison,
    without signs; next to the choice that it makes, since the compiler keeps many at once in a roundabout way."""
    OTHER: gl.constexpr = "0fFF800000" if INFINITE else "0f00000000"
    return gl.inline_asm_elementwise(
        "{.reg .pred q; .reg .b32 t; sub.s32 t,$2,$3; setp.lt.u32 q,t,$4; selp.f32 $0,$1," + OTHER + ",q;}",
        "=r,r,r,r,r",
        [x, row, enter, count],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def gate(score, threshold):
    """``clip(score - threshold, 0, 1)`` in one instruction."""
    return gl.inline_asm_elementwise(
        "sub.sat.f32 $0, $1, $2;", "=r,r,r", [score, threshold], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def where_inside(x, gates):
    """``x`` where gates are strictly between 0 and 1, else 0. The bits of gates are integers in the same order."""
    return gl.inline_asm_elementwise(
        "{.reg .pred q; .reg .b32 t; add.s32 t,$2,-1; setp.lt.u32 q,t,0x3F7FFFFF; selp.f32 $0,$1,0f00000000,q;}",
        "=r,r,r",
        [x, gates],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def sums_of_threads(x):
    """Sums over the columns that one thread holds, ``[64, 64]`` to ``[64, 4]``: no shuffle (8 columns a core matrix of
    the MMA, two neighbours a thread), and one multiply-add an element where ``x`` is a product."""
    x = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(x, axis=1), axis=2)


@gluon.jit
def copy_rows(ptr, stride, index, buffer):
    """Rows of a matrix, whose numbers lie in shared memory, into a tile. Returns while they are on their way."""
    ROWS: gl.constexpr = buffer.shape[0]
    D: gl.constexpr = buffer.shape[1]
    ACROSS: gl.constexpr = D // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    dim = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    for part in gl.static_range(ROWS // CHUNK):
        row = index.slice(part * CHUNK, CHUNK).load(gl.SliceLayout(1, LAYOUT)).to(gl.int64)
        copy_async(buffer.slice(part * CHUNK, CHUNK), ptr + (row * stride)[:, None] + dim[None, :])


@gluon.jit
def describe_neighbours(seen, scores, start, first, tokens, window, doc_end_ptr, PACKED: gl.constexpr):
    """Which rows see the neighbours from ``start`` on, and scores of gates of 1, for a step that is masked."""
    KEYS: gl.constexpr = seen.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    key = start + gl.arange(0, KEYS, LAYOUT)
    leave = key + window
    if PACKED:
        leave = gl.minimum(leave, gl.load(doc_end_ptr + key, mask=key < tokens, other=0))
    enter = gl.minimum(gl.maximum(key - first, 0), TILE)
    leave = gl.minimum(gl.maximum(leave - first, 0), TILE)
    seen.store(enter | (gl.maximum(leave - enter, 0) << SEEN_BITS))
    scores.store(gl.full([KEYS], float("inf"), gl.float32, LAYOUT))


@gluon.jit
def wait_empty(empty, step, STAGES: gl.constexpr):
    """Until both consumers have left the slot of a step."""
    mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)


@gluon.jit
def listed_at(i, n_rest, whole, KEYS: gl.constexpr):
    """Where the i-th tile of the list begins: those that not every row sees come first."""
    return gl.where(i < n_rest, whole + i * KEYS, (i - n_rest) * KEYS)
