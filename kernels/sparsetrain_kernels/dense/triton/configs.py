"""Tile sizes of each kernel: a short table by head dim and dtype, measured on the card for bf16 and head dims of 128,
nothing tuned at run time."""

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
    128: Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 128, 8, 3)),
    256: Configs(Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
}
# fp32 products run on the ordinary cores, exactly.
_SINGLE = {
    64: Configs(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    128: Configs(Config(64, 32, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 2)),
    256: Configs(Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}


def choose_configs(dtype: torch.dtype, d_pad: int) -> Configs:
    """The configurations for a head dim padded to ``d_pad``."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[d_pad]
