"""Estimates in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.key_estimate.inputs import EstimateInputs
from sparsetrain_kernels.key_mirror.layout import BYTES, GRANULE, KeyMirror, PageBounds
from sparsetrain_kernels.key_mirror.reference import LARGEST, unpack

LIMIT = 127 * 128
"""The largest integer of a query's channel: 127 in a first digit to the base 128, and 0 in a second."""
COLUMNS = 4096
"""Columns of the scores that are worked out at a time."""
LEAST = torch.finfo(torch.float16).min
TOGETHER = 16384
"""Keys of a sequence that are multiplied at once for exact weights."""


def estimate(call: EstimateInputs) -> tuple[Tensor, Tensor]:
    """``scores``, fp16 ``[B, Hq, M]``, and their log-sum-exp, fp32 ``[B, Hq]``. Reads ``lengths`` on the host.

    Raises:
        ValueError: a length is not 0 to ``max_length``.
    """
    check_lengths(call.lengths, call.max_length)
    due = None if call.due is None else call.due.tolist()
    mirror = call.mirror
    batch, heads = call.query.shape[:2]
    kv_heads, page_size = mirror.codes.shape[1:3]
    group = heads // kv_heads
    query = call.query[:, :, 0].float().unflatten(1, (kv_heads, group))
    integers, unit = to_integers(query * mirror.spread[:, :, None])
    offset = torch.zeros_like(unit)
    if call.softcap is not None:
        offset = (query * mirror.center[:, :, None]).sum(3, keepdim=True) * call.scale
    scores = torch.full((batch, kv_heads, group, call.columns), float("-inf"), dtype=torch.float16, device=query.device)
    kv_head = torch.arange(kv_heads, device=query.device)[:, None]
    for sequence, length in enumerate(call.lengths.tolist()):
        if due is not None and not due[sequence]:
            continue
        for start in range(0, call.columns, COLUMNS):
            column = torch.arange(start, min(start + COLUMNS, call.columns), device=query.device)
            position, is_key = _positions(call, sequence, column, length)
            table = call.block_table[sequence].long()
            page = table[torch.where(is_key, position // page_size, 0)]
            is_key = is_key & (page >= 0)
            place = torch.where(is_key, page, 0), kv_head, position % page_size
            step, low = mirror.scale_low[place].float()[:, None].unbind(-1)
            product = integers[sequence] @ unpack(mirror.codes[place]).transpose(1, 2)
            score = product * step + integers[sequence].sum(2, keepdim=True) * low
            score = score * (call.scale * unit[sequence])
            if call.softcap is not None:
                score = call.softcap * torch.tanh((score + offset[sequence]) / call.softcap)
            score = score.clamp(-LARGEST, LARGEST).half()
            scores[sequence, :, :, column] = score.where(is_key[:, None], float("-inf"))
    scores = scores.flatten(1, 2)
    return scores, scores.float().logsumexp(2)


def _positions(call: EstimateInputs, sequence: int, column: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The positions whose scores stand in these columns, ``[Hkv, columns]``, and whether there are any."""
    kv_heads = call.mirror.codes.shape[1]
    if call.page_lists is None or call.page_counts is None:
        position = column.expand(kv_heads, -1)
        return position, position < length
    entry = call.page_lists[sequence].long()[:, column // call.granule]
    is_listed = (column // call.granule < call.page_counts[sequence][:, None]) & (entry >= 0)
    position = entry * call.granule + column % call.granule
    return position, is_listed & (position < length)


def to_integers(query: Tensor) -> tuple[Tensor, Tensor]:
    """``query [..., D]`` as integers of up to 127 * 128, in fp32, and the unit that they count, ``[..., 1]``."""
    unit = query.abs().amax(-1, keepdim=True) / LIMIT
    unit = torch.where(unit == 0, 1.0, unit)
    return torch.floor(query / unit + 0.5), unit


def upper_bounds(
    query: Tensor,
    bounds: PageBounds,
    lengths: Tensor,
    block_table: Tensor,
    granules: int,
    scale: float,
    due: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`sparsetrain_kernels.page_scores`, of ``granules`` times 16 tokens. Reads ``lengths`` on the host.

    Raises:
        ValueError: a length is not 0 to what the granules hold.
    """
    check_lengths(lengths, granules * GRANULE)
    kv_heads, in_page = bounds.values.shape[1:3]
    query = query[:, :, 0].float().unflatten(1, (kv_heads, -1))
    offset = query.new_zeros(*query.shape[:3], 1)
    if bounds.values.dtype == BYTES and bounds.center is not None and bounds.spread is not None:
        offset = (query * bounds.center[:, :, None]).sum(3, keepdim=True)
        query = query * bounds.spread[:, :, None]
    in_bytes = bounds.values.dtype == BYTES
    # Operations on indices do not know every type of 8 bits.
    values = bounds.values.view(torch.uint8) if in_bytes else bounds.values
    granule = torch.arange(granules, device=query.device)
    page = block_table.long()[:, granule // in_page]
    kept = (page >= 0) & (granule * GRANULE < lengths[:, None])
    if due is not None:
        kept &= due[:, None]
    scores = query.new_full((*query.shape[:2], granules), float("-inf"))
    for sequence in range(query.shape[0]):
        for part in kept[sequence].nonzero()[:, 0].split(COLUMNS):
            both = values[page[sequence, part], :, part % in_page]
            lowest, highest = (both.view(BYTES) if in_bytes else both).float().permute(2, 1, 3, 0)
            own = query[sequence]
            score = own.clamp(min=0) @ highest + own.clamp(max=0) @ lowest + offset[sequence]
            scores[sequence, :, part] = (score.amax(1) * scale).clamp(-LARGEST, LARGEST)
    return scores.to(dtype)


def center_logits(query: Tensor, mirror: KeyMirror, scale: float) -> Tensor:
    """The logit of the mean key, fp32 ``[B, Hq]``."""
    grouped = query[:, :, 0].float().unflatten(1, (mirror.center.shape[1], -1))
    return ((grouped * mirror.center[:, :, None]).sum(3) * scale).flatten(1)


def check_lengths(lengths: Tensor, most: int) -> None:
    """Every length is possible.

    Raises:
        ValueError: one is not 0 to ``most``.
    """
    values = lengths.tolist()
    if not all(0 <= length <= most for length in values):
        raise ValueError(f"lengths={values} must be 0 to max_length={most}")


def key_weights(
    query: Tensor,
    key_cache: Tensor,
    lse: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    max_length: int,
    scale: float,
    softcap: float | None,
    due: Tensor | None,
) -> Tensor:
    """As :func:`sparsetrain_kernels.key_weights`, some pages at a time; fp16 ``[B, Hq, max_length]``."""
    batch, heads = query.shape[:2]
    _, kv_heads, page, _ = key_cache.shape
    weights = torch.empty((batch, heads, max_length), dtype=torch.float16, device=query.device)
    if due is not None and due.device.type == "cpu" and not due.any():
        return weights
    wide = torch.promote_types(query.dtype, torch.float32)
    asked = query[:, :, 0].unflatten(1, (kv_heads, -1)).to(wide)
    totals = lse.unflatten(1, (kv_heads, -1))[..., None]
    start = 0
    for table in block_table[:, : -(-max_length // page)].split(max(TOGETHER // page, 1), 1):
        held = key_cache[table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3).to(wide)
        logits = asked @ held.mT * scale
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        part = (logits.float() - totals).clamp(min=LEAST).half()
        is_kept = (table >= 0).repeat_interleave(page, 1)
        part = part.masked_fill(~is_kept[:, None, None], float("-inf")).flatten(1, 2)
        count = min(part.shape[2], max_length - start)
        weights[:, :, start : start + count] = part[..., :count]
        start += count
    return weights
