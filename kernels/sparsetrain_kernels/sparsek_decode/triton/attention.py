"""The attention of a step: each program reads one split of the slots; the splits are merged as in other decoding."""

import triton
import triton.language as tl

from sparsetrain_kernels.online_softmax import LOG2E, accumulate_gated


@triton.jit
def sparsek_decode_attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    scores_ptr,
    threshold_ptr,
    read_ptr,
    kept_ptr,
    out_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_h,
    splits,
    scale,
    TOPK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATE: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A share of the slots of one text and KV head, for ``BLOCK_M`` of the ``GROUP`` query heads that read them. Writes
    a normalised output, ``[B, Hq, splits, D]``, and its log-sum-exp, ``[B, Hq, splits]``; of shares that hold nothing,
    zeros and -inf. Grid: tiles of heads fastest, which share their keys in L2, then splits, KV heads, batch.

    Which slots are empty follows from the number of tokens read: their positions need not be loaded ahead of the keys.
    With ``KEPT`` a byte of each slot says whether it is read.
    The peak is kept in units of the raw products.
    """
    SLOTS: tl.constexpr = SINKS + TOPK + WINDOW
    ROW_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (SLOTS + BLOCK_N - 1) // BLOCK_N
    row_tile = tl.program_id(0) % ROW_TILES
    split = tl.program_id(0) // ROW_TILES % splits
    kv_head = (tl.program_id(0) // ROW_TILES // splits % KV_HEADS).to(tl.int64)
    batch = (tl.program_id(0) // ROW_TILES // splits // KV_HEADS).to(tl.int64)
    in_group = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = in_group < GROUP
    head = kv_head * GROUP + in_group
    dim = tl.arange(0, D_PAD)
    is_cell = is_row[:, None] & (dim < D)[None, :]
    query_cells = batch * query_stride_b + (head * query_stride_h)[:, None] + dim[None, :]
    query = tl.load(query_ptr + query_cells, mask=is_cell, other=0.0)

    keys_ptr += (batch * KV_HEADS + kv_head) * (SLOTS * D)
    values_ptr += (batch * KV_HEADS + kv_head) * (SLOTS * D)
    selection = batch * SELECTIONS + (kv_head if SELECTIONS > 1 else 0)
    scores_ptr += selection * SLOTS
    threshold = tl.load(threshold_ptr + selection)
    read = tl.load(read_ptr + selection)

    to_log2 = scale * LOG2E
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    column = tl.arange(0, BLOCK_N)
    for tile in tl.range(TILES * split // splits, TILES * (split + 1) // splits):
        slot = tile * BLOCK_N + column
        is_held = holds_token(slot, read, TOPK, WINDOW, SINKS)
        if KEPT:
            choice = kept_ptr + (batch * KV_HEADS + kv_head) * SLOTS + slot
            is_held = is_held & (tl.load(choice, mask=is_held, other=0) != 0)
        cells = slot.to(tl.int64) * D
        key_mask = is_held[None, :]
        value_mask = is_held[:, None]
        if D != D_PAD:
            key_mask = key_mask & (dim < D)[:, None]
            value_mask = value_mask & (dim < D)[None, :]
        key = tl.load(keys_ptr + cells[None, :] + dim[:, None], mask=key_mask, other=0.0)
        value = tl.load(values_ptr + cells[:, None] + dim[None, :], mask=value_mask, other=0.0)
        gates = 1.0
        if GATE != "straight":
            is_selected = (slot >= SINKS) & (slot < SINKS + TOPK)
            above = tl.load(scores_ptr + slot, mask=is_selected & is_held, other=0.0) - threshold
            # Comparisons that keep NaN, unlike a minimum and a maximum.
            above = tl.where(above < 0, 0.0, tl.where(above > 1, 1.0, above))
            gates = tl.where(is_selected, above, 1.0)[None, :]
        logits = tl.dot(query, key, input_precision=PRECISION)
        logits = tl.where(is_held[None, :], logits, float("-inf"))
        peak, total, acc = accumulate_gated(logits, gates, value, peak, total, acc, to_log2, GATE, PRECISION)

    # With the log gate a share may hold keys and give none of them a weight.
    is_nothing = total == 0
    total = tl.where(is_nothing, 1.0, total)
    lse = tl.where(is_nothing, float("-inf"), (peak * to_log2 + tl.log2(total)) / LOG2E)
    place = (batch * KV_HEADS * GROUP + head) * splits + split
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (place * D)[:, None] + dim[None, :], out, mask=is_cell)
    tl.store(lse_ptr + place, lse, mask=is_row)


@triton.jit
def holds_token(slot, read, TOPK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Whether slots hold a token after ``read`` of them. Those of sinks and selected tokens fill from the first on, the
    ring from the place of position ``SINKS`` on."""
    in_window = tl.minimum(tl.maximum(read - SINKS, 0), WINDOW).to(tl.int32)
    competed = tl.minimum(tl.maximum(read - SINKS - WINDOW, 0), TOPK).to(tl.int32)
    sinks = tl.minimum(read, SINKS).to(tl.int32)
    place = slot - SINKS
    # Places of the ring counted from that one; of other slots any number.
    turn = (place - TOPK + WINDOW - SINKS % WINDOW) % WINDOW
    in_ring = (slot < SINKS + TOPK + WINDOW) & (turn < in_window)
    return tl.where(place < 0, slot < sinks, tl.where(place < TOPK, place < competed, in_ring))
