"""The kernel that takes a token into the slots: one program a text and selection."""

import triton
import triton.language as tl

from sparsetrain_kernels.sparsek_decode.triton.threshold import read_entries, solve_threshold


@triton.jit
def sparsek_decode_update_kernel(
    key_ptr,
    value_ptr,
    new_scores_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    scores_ptr,
    buffer_ptr,
    threshold_ptr,
    read_ptr,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    new_scores_stride_b,
    new_scores_stride_h,
    TOPK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SELECTIONS: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PLACES: tl.constexpr,
    BUFFER: tl.constexpr,
):
    """Everything that changes for one selection, of which ``SHARE`` KV heads are the keys.

    ``PLACES`` selected slots and ``BUFFER`` entries of the buffer are read at a time. No other program touches these
    slots. All that is read of them is read before the barrier, and all that is written, after it.
    """
    SLOTS: tl.constexpr = SINKS + TOPK + WINDOW
    selection = tl.program_id(0).to(tl.int64)
    batch = selection // SELECTIONS
    head = selection % SELECTIONS
    positions_ptr += selection * SLOTS
    scores_ptr += selection * SLOTS
    buffer_ptr += selection * ENTRIES
    position = tl.load(read_ptr + selection)
    ring = SINKS + TOPK + position % WINDOW
    competes = position - WINDOW >= SINKS

    # The leaver's key and value, and the new token's: [SHARE_PAD, D_PAD] each.
    in_share = tl.arange(0, SHARE_PAD)
    dim = tl.arange(0, D_PAD)
    is_cell = (in_share < SHARE)[:, None] & (dim < D)[None, :]
    kv_head = head * SHARE + in_share
    cells = ((batch * SELECTIONS * SHARE + kv_head) * (SLOTS * D))[:, None] + dim[None, :]
    old_key = tl.load(keys_ptr + cells + ring * D, mask=is_cell)
    old_value = tl.load(values_ptr + cells + ring * D, mask=is_cell)
    key_cells = batch * key_stride_b + (kv_head * key_stride_h)[:, None] + dim[None, :]
    value_cells = batch * value_stride_b + (kv_head * value_stride_h)[:, None] + dim[None, :]
    new_key = tl.load(key_ptr + key_cells, mask=is_cell)
    new_value = tl.load(value_ptr + value_cells, mask=is_cell)
    new_score = tl.load(new_scores_ptr + batch * new_scores_stride_b + head * new_scores_stride_h)
    old_score = tl.load(scores_ptr + ring)
    old_position = tl.load(positions_ptr + ring)

    # The place to lose: of the smallest score, and among those of the oldest token. An empty one is both.
    lowest = float("inf")
    oldest = position
    loser = 0
    for start in tl.range(0, TOPK, PLACES):
        place = start + tl.arange(0, PLACES)
        is_place = place < TOPK
        score = tl.load(scores_ptr + SINKS + place, mask=is_place, other=float("inf"))
        came = tl.load(positions_ptr + SINKS + place, mask=is_place, other=position)
        low = tl.min(score, 0)
        old = tl.min(tl.where(score == low, came, position), 0)
        at = tl.min(tl.where((score == low) & (came == old), place, TOPK), 0)
        better = (low < lowest) | ((low == lowest) & (old < oldest))
        lowest = tl.where(better, low, lowest)
        oldest = tl.where(better, old, oldest)
        loser = tl.where(better, at, loser)
    wins = competes & (old_score >= lowest)

    # The entry of the buffer that makes room, if the leaver's score is larger.
    held = read_entries(buffer_ptr, 0, ENTRIES, BUFFER, -1, old_score)
    least = float("inf")
    entry = 0
    for start in tl.range(0, ENTRIES, BUFFER):
        block = held if BUFFER >= ENTRIES else read_entries(buffer_ptr, start, ENTRIES, BUFFER, -1, old_score)
        column = start + tl.arange(0, BUFFER)
        block = tl.where(column < ENTRIES, block, float("inf"))
        low = tl.min(block, 0)
        at = tl.min(tl.where(block == low, column, ENTRIES), 0)
        entry = tl.where(low < least, at, entry)
        least = tl.minimum(least, low)
    enters = competes & (old_score > least)
    replaced = tl.where(enters, entry, -1)
    before = tl.load(threshold_ptr + selection)
    threshold = solve_threshold(buffer_ptr, held, replaced, old_score, before, TOPK, ENTRIES, BUFFER)

    tl.debug_barrier()
    target = tl.where(position < SINKS, position, ring)
    to_place = cells + (SINKS + loser) * D
    is_moved = (in_share < tl.where(wins, SHARE, 0))[:, None] & (dim < D)[None, :]
    tl.store(keys_ptr + to_place, old_key, mask=is_moved)
    tl.store(values_ptr + to_place, old_value, mask=is_moved)
    tl.store(scores_ptr + SINKS + loser, old_score, mask=wins)
    tl.store(positions_ptr + SINKS + loser, old_position, mask=wins)
    tl.store(keys_ptr + cells + target * D, new_key, mask=is_cell)
    tl.store(values_ptr + cells + target * D, new_value, mask=is_cell)
    tl.store(scores_ptr + target, new_score)
    tl.store(positions_ptr + target, position)
    tl.store(buffer_ptr + entry, old_score, mask=enters)
    tl.store(threshold_ptr + selection, threshold)
    tl.store(read_ptr + selection, position + 1)
