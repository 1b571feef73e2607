"""Tiles of the kernels, and among how many programs the keys are divided."""

from __future__ import annotations

import torch

from sparsetrain_kernels.block_decode.triton.configs import WAVES, Config
from sparsetrain_kernels.launching import cdiv, next_power_of_2

# Keys of a tile, by head dim and by rows of a tile. A list, the page of each of its keys, and the key are loaded one
# for the other: large tiles hide that better than many on the way, and the other program of a multiprocessor does the
# rest.
_HALF = {(64, 16): 128, (64, 32): 128, (128, 16): 128, (128, 32): 64, (256, 16): 32}
_STAGES = 2
# fp32 products run on the ordinary cores, exactly.
_SINGLE = {64: 64, 128: 16, 256: 16}
_SINGLE_STAGES = 5
MERGE_STEPS = (8, 32)
"""Parts merged at a time, at least and at most: of most rows there are no more."""


def choose_tiles(dtype: torch.dtype, d_pad: int, rows: int) -> Config:
    """For a head dim padded to ``d_pad`` and ``rows`` rows a KV head."""
    if dtype == torch.float32:
        return Config(16, _SINGLE[d_pad], _SINGLE_STAGES)
    block_m = 16 if rows <= 16 or d_pad == 256 else 32
    return Config(block_m, _HALF[d_pad, block_m], _STAGES)


def choose_programs(items: int, most_keys: int, block_n: int, row_tiles: int, processors: int) -> int:
    """As many as run at a time, but no more than there can be tiles: ``items`` lists of up to ``most_keys`` keys."""
    return max(1, min(WAVES * processors // row_tiles, items * cdiv(most_keys, block_n)))


def choose_step(programs: int, items: int) -> int:
    """Parts that a row of one of ``items`` lists is merged from at a time: those of lists of equal lengths."""
    least, most = MERGE_STEPS
    return min(max(next_power_of_2(cdiv(programs, items) + 1), least), most)
