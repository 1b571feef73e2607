"""Random draws as functions of a seed and a key, so that each can be repeated independently of earlier draws."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A separate generator for each ``key``."""
    return np.random.default_rng(int.from_bytes(_digest(seed, key), "little"))


def uniform(seed: int, *key: int | str) -> float:
    """One draw from ``[0, 1)``, about ten times cheaper than a generator."""
    return (int.from_bytes(_digest(seed, key)[:8], "little") >> 11) / (1 << 53)


def _digest(seed: int, key: tuple[int | str, ...]) -> bytes:
    return blake2b("/".join(str(part) for part in (seed, *key)).encode(), digest_size=16).digest()
