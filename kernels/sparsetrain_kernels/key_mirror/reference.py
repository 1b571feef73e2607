"""Codes, bounds and appending in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.key_mirror.layout import BYTES, GRANULE, KeyMirror, PageBounds

LARGEST = 65504.0
"""The largest number in fp16, and the largest key in units of its spread."""


def to_codes(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """``scaled [..., D]``, a key less its center and divided by its spread, as codes uint8 ``[..., D // 2]`` and fp16
    ``[..., 2]``: step and low. What is no number makes the step none."""
    wrong = (scaled.float() - scaled.float()).sum(-1, keepdim=True)
    scaled = scaled.float().clamp(-LARGEST, LARGEST)
    low, high = scaled.amin(-1, keepdim=True), scaled.amax(-1, keepdim=True)
    scale_low = torch.cat([(high - low) * (1 / 15) + wrong, low], -1).half()
    step, low = scale_low.float().split(1, -1)
    codes = torch.floor((scaled - low) / torch.where(step == 0, 1.0, step) + 0.5).clamp(0, 15)
    left, right = codes.nan_to_num(0).to(torch.uint8).chunk(2, -1)
    return left | right << 4, scale_low


def from_codes(codes: Tensor, scale_low: Tensor) -> Tensor:
    """fp32 ``[..., D]``: what the codes stand for, in units of the spread and from the center."""
    step, low = scale_low.float().split(1, -1)
    return unpack(codes) * step + low


def unpack(codes: Tensor) -> Tensor:
    """``[..., D // 2]`` bytes as ``[..., D]`` integers from 0 to 15, in fp32."""
    return torch.cat([codes & 15, codes >> 4], -1).float()


def round_outwards(scaled: Tensor, up: bool) -> Tensor:
    """fp32 to 8 bits: the next number that is not smaller, with ``up``, or not larger. Below 2^-6 only 0 is used."""
    size = scaled.abs()
    away = (scaled > 0) == up
    bits = (size.view(torch.int32) + torch.where(away, 0xFFFFF, 0) >> 20) - (127 - 7) * 8
    bits = torch.where(size < 2.0**-6, torch.where(away & (size > 0), 8, 0), bits.clamp(max=0x7E))
    return torch.where(scaled < 0, bits | 0x80, bits).to(torch.uint8).view(BYTES)


def append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    mirror: KeyMirror | None,
    bounds: PageBounds | None,
) -> None:
    """As :func:`sparsetrain_kernels.append_tokens`. Reads ``lengths`` on the host.

    Raises:
        ValueError: a length is not 0 to what ``block_table`` has room for.
    """
    places = _places(key.shape[2], key_cache.shape[2], lengths, block_table)
    sequence, row, page, slot = places
    key_cache[page, :, slot] = key[sequence, :, row]
    value_cache[page, :, slot] = value[sequence, :, row]
    if mirror is not None:
        _write_codes(key, places, mirror)
    if bounds is not None:
        for number, length in enumerate(lengths.tolist()):
            _extend_bounds(key, number, length, block_table, bounds)


def append_codes(key: Tensor, lengths: Tensor, block_table: Tensor, mirror: KeyMirror) -> None:
    """As :func:`sparsetrain_kernels.append_codes`. Reads ``lengths`` on the host.

    Raises:
        ValueError: a length is not 0 to what ``block_table`` has room for.
    """
    _write_codes(key, _places(key.shape[2], mirror.codes.shape[2], lengths, block_table), mirror)


def _write_codes(key: Tensor, places: tuple[Tensor, Tensor, Tensor, Tensor], mirror: KeyMirror) -> None:
    """Write the codes of the new keys that are kept, at the pages and slots that :func:`_places` found."""
    sequence, row, page, slot = places
    scaled = (key[sequence, :, row].float() - mirror.center[sequence]) / mirror.spread[sequence]
    mirror.codes[page, :, slot], mirror.scale_low[page, :, slot] = to_codes(scaled)


def _places(new: int, page_size: int, lengths: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequence and row of the new tokens that are kept, and the page and the slot of each."""
    room = block_table.shape[1] * page_size
    if not all(0 <= length <= room for length in lengths.tolist()):
        raise ValueError(f"lengths={lengths.tolist()} must be 0 to the {room} tokens that block_table has pages for")
    position = lengths.long()[:, None] - new + torch.arange(new, device=lengths.device)
    page = block_table.long().gather(1, position.clamp(min=0) // page_size)
    sequence, row = ((position >= 0) & (page >= 0)).nonzero(as_tuple=True)
    return sequence, row, page[sequence, row], position[sequence, row] % page_size


def _extend_bounds(key: Tensor, sequence: int, length: int, block_table: Tensor, bounds: PageBounds) -> None:
    """Take the last tokens of one sequence into its bounds."""
    first = max(length - key.shape[2], 0)
    if first == length:
        return
    own = key[sequence, :, first - length :]
    if bounds.center is not None and bounds.spread is not None:
        own = (own.float() - bounds.center[sequence, :, None]) / bounds.spread[sequence, :, None]
    granule = torch.arange(first // GRANULE, (length - 1) // GRANULE + 1, device=key.device)
    padding = (0, 0, first % GRANULE, -length % GRANULE)
    # Operations on indices do not know every type of 8 bits.
    in_bytes = bounds.values.dtype == BYTES
    values = bounds.values.view(torch.uint8) if in_bytes else bounds.values
    in_page = values.shape[2]
    page = block_table[sequence].long()[granule // in_page]
    kept = page >= 0
    page, granule = page[kept], granule[kept]
    for side, up in enumerate((False, True)):
        if own.shape[1] == 1:  # a step, whose key is both extremes of what it adds
            extreme = own[:, kept].transpose(0, 1)
        else:
            padded = torch.nn.functional.pad(own, padding, value=float("-inf" if up else "inf"))
            padded = padded.unflatten(1, (-1, GRANULE))[:, kept]
            extreme = (padded.amax(2) if up else padded.amin(2)).transpose(0, 1)
        old = values[page, :, granule % in_page, side]
        if in_bytes:
            extreme = round_outwards(extreme.contiguous(), up).to(own.dtype)
            old = old.view(BYTES).to(own.dtype)
        both = torch.maximum(old, extreme) if up else torch.minimum(old, extreme)
        begun = (granule * GRANULE < first)[:, None, None]
        extreme = torch.where(begun, both, extreme)
        values[page, :, granule % in_page, side] = extreme.to(BYTES).view(torch.uint8) if in_bytes else extreme
