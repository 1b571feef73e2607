"""The settings of a layer by which rows choose keys and read them."""

from __future__ import annotations

from typing import NamedTuple


class Rules(NamedTuple):
    """Fields of :class:`~sparsetrain.methods.recycled.method.RecycledConfig` of the same names."""

    keep: int
    p: float | None
    sinks: int
    recent: int
    similarity: float | None
