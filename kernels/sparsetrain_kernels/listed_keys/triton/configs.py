"""Tile sizes of each kernel: a short table by head dim and dtype, measured on the card for bf16 and head dims of 128,
nothing tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsetrain_kernels.launching import Config, next_power_of_2


class Configs(NamedTuple):
    """The configurations of one call: over rows (forward and backward), and over keys (sums of parts, neighbours)."""

    fwd: Config
    rows: Config
    sums: Config
    """``block_m`` entries of lists at a time."""
    keys: Config


def tile_lines(dtype: torch.dtype, d_pad: int, segment_rows: int, group: int) -> int:
    """Lines of a tile, of which each row of a segment takes one for each head of its group: enough for a segment of the
    usual number of rows, within what has a configuration."""
    most = 64 if d_pad > 128 or dtype == torch.float32 else 128
    return max(16, min(most, next_power_of_2(segment_rows * group)), next_power_of_2(group))


def choose_configs(dtype: torch.dtype, d_pad: int, lines: int) -> Configs:
    """The configurations for a head dim padded to ``d_pad`` and tiles of so many lines."""
    if dtype == torch.float32:
        # fp32 products run on the ordinary cores, exactly.
        small = d_pad > 128
        rows = Config(lines, 16 if small else 32, 8, 1)
        keys = Config(16, 16, 4, 1) if small else Config(32, 32, 4, 1)
        return Configs(rows, rows, Config(16, 16, 4, 1), keys)
    if d_pad > 128:
        return Configs(Config(lines, 32, 8, 2), Config(lines, 32, 8, 1), Config(64, 64, 8, 3), Config(32, 64, 8, 2))
    long = lines > 64
    wide = long and d_pad == 128
    return Configs(
        Config(lines, 128, 8, 2) if wide else Config(lines, 64, 8 if long else 4, 3),
        Config(lines, 64, 8 if long else 4, 3 if wide else 2),
        Config(128, 64, 4, 3),
        Config(64, 64, 4, 2),
    )
