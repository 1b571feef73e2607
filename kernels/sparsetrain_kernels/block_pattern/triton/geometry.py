"""Where tiles lie and which blocks they read: integer arithmetic shared by the kernels.

A block of ``BLOCK`` tokens is cut into tiles, counted from the block's start, so that no tile straddles two blocks; the
last tile of a block is short where the tile's rows do not divide ``BLOCK``. Tiles count from position 0 of a document.
"""

import triton
import triton.language as tl

ITEM = tl.constexpr(5)
"""Integers of a work item: the document's first row, its length, the tile, the chunk of a split sink tile or -1, and
the document's first block in tensors that pad every document to whole blocks. A negative tile is nothing to do."""

SCAN = tl.constexpr(128)
"""Items, and documents, that one step of :func:`work_items_kernel` looks at."""


@triton.jit
def read_item(items_ptr, item):
    """The integers of a work item; rows as 64-bit numbers."""
    items_ptr += item * ITEM
    document = tl.load(items_ptr).to(tl.int64)
    padded = tl.load(items_ptr + 4).to(tl.int64)
    return document, tl.load(items_ptr + 1), tl.load(items_ptr + 2), tl.load(items_ptr + 3), padded


@triton.jit
def place_of(pid, items, HEADS: tl.constexpr):
    """The head, item and batch of a program: heads fastest, then items and the batch."""
    return pid % HEADS, pid // HEADS % items, (pid // HEADS // items).to(tl.int64)


@triton.jit
def key_list(far_ptr, query_block, window, sinks, FAR: tl.constexpr):
    """The list of a query block: its number of sinks, of far blocks, and its first window block."""
    n_sink = tl.minimum(sinks, query_block)
    n_far = tl.sum((tl.load(far_ptr + tl.arange(0, FAR)) <= query_block - sinks).to(tl.int32))
    return n_sink, n_far, tl.maximum(n_sink, query_block - window + 1)


@triton.jit
def key_block_at(far_ptr, index, query_block, n_sink, n_far, first):
    """Entry ``index`` of that list. The own block is the last one."""
    far = index - n_sink
    is_far = (far >= 0) & (far < n_far)
    distance = tl.load(far_ptr + far, mask=is_far, other=0)
    return tl.where(far < 0, index, tl.where(is_far, query_block - distance, first + far - n_far))


@triton.jit
def query_list(far_ptr, key_block, window, sinks, first_block, last_block, FAR: tl.constexpr):
    """The query blocks from ``first_block`` to ``last_block`` that read a key block: the first and the number of those
    next to it (for a sink, all of them), and the first and the number of far distances."""
    is_sink = key_block < sinks
    first = tl.maximum(key_block, first_block)
    last = tl.where(is_sink, last_block, tl.minimum(key_block + window - 1, last_block))
    far = tl.load(far_ptr + tl.arange(0, FAR))
    before = tl.sum((far < first_block - key_block).to(tl.int32))
    until = tl.sum((far <= last_block - key_block).to(tl.int32))
    return first, tl.maximum(last - first + 1, 0), before, tl.where(is_sink, 0, until - before)


@triton.jit
def query_block_at(far_ptr, index, key_block, first, n_near, before, n_far):
    """Entry ``index`` of that list. The own block, where it is listed, is the first one."""
    is_far = (index >= n_near) & (index < n_near + n_far)
    distance = tl.load(far_ptr + before + index - n_near, mask=is_far, other=0)
    return tl.where(is_far, key_block + distance, first + index)


@triton.jit
def tiles_before(position, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tiles of a document that start before ``position``."""
    return position // BLOCK * tl.cdiv(BLOCK, TILE) + tl.cdiv(position % BLOCK, TILE)


@triton.jit
def work_items_kernel(
    items_ptr,
    cu_seqlens_ptr,
    documents,
    rows,
    q_start,
    sinks,
    split_items,
    total_items,
    chunk,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Write the work items of a call, ``int32 [total_items, ITEM]``: the chunks of split sink tiles, in the first
    ``split_items`` places, then the other tiles of every document, ascending. What is left over is nothing to do.

    A document is split where it has sinks and is longer than a ``chunk`` of blocks; with ``chunk`` 0, none is. Without
    ``cu_seqlens`` there is one document, of which the tiles from ``q_start`` on are listed.
    """
    item = tl.program_id(0) * SCAN + tl.arange(0, SCAN)
    in_split = tl.program_id(0) * SCAN < split_items
    item = tl.where(in_split, item, item - tl.cdiv(split_items, SCAN) * SCAN)
    # The document of an item is the last one whose first item is not later.
    document = tl.full([SCAN], -1, tl.int32)
    base = tl.zeros([SCAN], tl.int32)
    seen = 0
    for start in range(0, documents, SCAN):
        index = start + tl.arange(0, SCAN)
        if PACKED:
            low = tl.load(cu_seqlens_ptr + index, mask=index < documents, other=0)
            length = tl.load(cu_seqlens_ptr + index + 1, mask=index < documents, other=0) - low
        else:
            length = tl.where(index < documents, rows, 0)
        split_tiles, chunks = _split(length, sinks, chunk, BLOCK, TILE)
        whole = tiles_before(length, BLOCK, TILE) - split_tiles - q_start // BLOCK * tl.cdiv(BLOCK, TILE)
        count = tl.where(in_split, split_tiles * chunks, whole)
        count = tl.where(index < documents, count, 0)
        before = seen + tl.cumsum(count) - count
        started = (before[None, :] <= item[:, None]) & (index < documents)[None, :]
        document += tl.sum(started.to(tl.int32), 1)
        base = tl.maximum(base, tl.max(tl.where(started, before[None, :], 0), 1))
        seen += tl.sum(count)
    if PACKED:
        low = tl.load(cu_seqlens_ptr + document)
        length = tl.load(cu_seqlens_ptr + document + 1) - low
    else:
        low = tl.zeros([SCAN], tl.int32)
        length = low + rows
    split_tiles, chunks = _split(length, sinks, chunk, BLOCK, TILE)
    offset = item - base
    tile = tl.where(in_split, offset // chunks, offset + split_tiles + q_start // BLOCK * tl.cdiv(BLOCK, TILE))
    piece = tl.where(in_split, offset % chunks, -1)
    tile = tl.where(item < seen, tile, -1)
    place = tl.where(in_split, item, item + split_items)
    here = tl.where(in_split, item < split_items, place < total_items)
    items_ptr += place * ITEM
    tl.store(items_ptr, low, mask=here)
    tl.store(items_ptr + 1, length, mask=here)
    tl.store(items_ptr + 2, tile, mask=here)
    tl.store(items_ptr + 3, piece, mask=here)
    # Documents that start in one block, or end in one, stay apart in the padded tensors.
    tl.store(items_ptr + 4, low // BLOCK + document, mask=here)


@triton.jit
def _split(length, sinks, chunk, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of documents of these lengths, the sink tiles that are split, and the chunks of each."""
    blocks = tl.cdiv(length, BLOCK)
    split = (chunk > 0) & (blocks > chunk)
    tiles = tl.where(split, tl.minimum(sinks * tl.cdiv(BLOCK, TILE), tiles_before(length, BLOCK, TILE)), 0)
    return tiles, tl.maximum(tl.where(chunk > 0, tl.cdiv(blocks, tl.maximum(chunk, 1)), 1), 1)
