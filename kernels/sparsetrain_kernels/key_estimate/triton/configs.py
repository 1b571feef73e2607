"""Tile sizes of the kernel that estimates scores, and into how many splits the keys of a sequence are cut."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How the kernel is compiled, and how often it runs."""

    block_n: int
    """Keys of a tile."""
    num_stages: int
    """Looking up a page takes every second stage, with a list every third."""
    num_warps: int
    programs: int
    """Programs a multiprocessor that the keys are cut for."""


def choose_config(half_pad: int, heads: int, page: int, listed: bool) -> Config:
    """For ``half_pad`` bytes of codes a key, padded, ``heads`` heads of a program and pages of ``page`` keys.

    Every warp holds the digits of all heads, which leaves less room for a tile of keys. Tiles of no more than a page
    know it at once; smaller pages than 64 keys are looked up key by key.
    """
    block_n = min(128, 2**16 // (half_pad * heads))
    if listed and half_pad > 64:
        block_n //= 2
    divisor = page & -page
    if not listed and 64 <= divisor < block_n:
        block_n = divisor
    return Config(block_n, 6 if listed else 7, 4, 4)


def choose_heads(group: int) -> int:
    """Heads of a group that a program takes: their digits are twice as many rows of a product."""
    return 8 if group <= 8 else 16


def choose_splits(programs: int, tiles: int, room: int) -> int:
    """Splits of the keys of each of ``programs`` programs, of at least one of ``tiles`` tiles, and so that no more than
    ``room`` programs run."""
    return max(1, min(room // programs, tiles))


def granules_of_a_tile(element_size: int, d_pad: int) -> int:
    """Bounds of 16 tokens that a program reads: 16 KiB of them."""
    return max(16, min(64, 2**14 // (2 * element_size * d_pad)))


def keys_of_a_tile(element_size: int, d_pad: int) -> int:
    """Keys that a program reads: up to 32 KiB of them."""
    return max(16, min(128, 2**15 // (element_size * d_pad)))
