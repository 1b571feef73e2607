"""Tile sizes of the decoding kernel, and into how many splits the keys of a sequence are cut."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

WAVES = 2
"""Programs a multiprocessor: as many as fit on one at a time."""
MIN_TILES = 2
"""Key tiles of a split, at least: a shorter one costs more to merge than it saves."""
WITHOUT_GPU = 8
"""Multiprocessors assumed in Triton's interpreter."""


class Config(NamedTuple):
    """How the kernel is compiled, for 4 warps."""

    block_m: int
    """Rows of a tile: the rows of the query heads of a KV head, or some of them."""
    block_n: int
    """Keys of a tile."""
    num_stages: int


# Keys of a tile: 32 KiB of keys and values, of which two programs a multiprocessor keep four or more on the way.
_HALF = {64: 128, 128: 64, 256: 32}
# fp32 products run on the ordinary cores, exactly.
_SINGLE = {64: 64, 128: 16, 256: 16}


def choose_config(dtype: torch.dtype, d_pad: int, block: int, rows: int, paged: bool) -> Config:
    """For a head dim padded to ``d_pad``, a pattern block of ``block`` tokens, and ``rows`` rows a KV head.

    Key tiles shrink to the largest power of two that divides the block if that is at least 64, and otherwise to the
    smallest that holds it: the rest of a tile is then masked. Larger tiles and deeper pipelines than these spill.
    """
    single = dtype == torch.float32
    block_m = 16 if single or rows <= 16 else 32
    divisor = block & -block
    limit = divisor if divisor >= 64 else max(16, 1 << (block - 1).bit_length())
    limit = limit if block_m == 16 else min(limit, 64)
    deep = not single and block_m == 16
    # Looking up a page takes every second stage.
    num_stages = (7 if deep else 5) if paged else (4 if deep else 3)
    return Config(block_m, min((_SINGLE if single else _HALF)[d_pad], limit), num_stages)


def choose_splits(programs: int, tiles: int, processors: int) -> int:
    """Shares that the keys of each of ``programs`` row tiles are cut into: of a list of ``tiles`` key tiles, and so
    that about ``WAVES`` programs run on each multiprocessor, all at once."""
    return max(1, min(WAVES * processors // programs, tiles // MIN_TILES))


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else WITHOUT_GPU
