"""Tile sizes of each kernel: a short table by head dim and dtype, every entry checked on the card, nothing tuned at run
time (an autotuner would pick a fast configuration that this Triton miscompiles)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsetrain_kernels.launching import Config


class Configs(NamedTuple):
    """The configurations of one call."""

    fwd: Config
    dq: Config
    dkv: Config


_HALF = {
    64: Configs(Config(128, 64, 4, 3), Config(128, 64, 4, 2), Config(64, 64, 4, 2)),
    128: Configs(Config(128, 128, 8, 2), Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
    256: Configs(Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
}
# fp32 products run on the ordinary cores, exactly.
_SINGLE = {
    64: Configs(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    128: Configs(Config(64, 32, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
    256: Configs(Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}


def choose_configs(dtype: torch.dtype, d_pad: int, block: int) -> Configs:
    """The configurations for a head dim padded to ``d_pad`` and a pattern block of ``block`` tokens.

    Tiles shrink to the largest power of two that divides the block if that is at least 64, and otherwise to the
    smallest that holds it: the rest of a tile is then masked.
    """
    table = _SINGLE if dtype == torch.float32 else _HALF
    configs = table[d_pad]
    divisor = block & -block
    limit = divisor if divisor >= 64 else max(16, 1 << (block - 1).bit_length())
    return Configs(*(_shrink(config, limit) for config in configs))


def _shrink(config: Config, limit: int) -> Config:
    block_m, block_n = min(config.block_m, limit), min(config.block_n, limit)
    warps = 4 if max(block_m, block_n) <= 64 else config.num_warps
    return Config(block_m, block_n, warps, config.num_stages)
