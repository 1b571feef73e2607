"""Puts the attention and the decode section of a row on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsetrain.generation.settings import Decode, parse_decode
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling import set_decode, sparsify
from sparsetrain.recipe.rows import Attention, Decoding, Row


def put(model: Any, attention: Attention, decoding: Decoding | None) -> None:
    """Give a model the attention and the decode section of a row.

    Raises:
        ModelError: it cannot take one of them.
    """
    if attention.config is not None:
        sparsify(model, attention.config)
    if decoding is not None and not decoding.recorded:
        set_decode(model, decoding.section)


@contextmanager
def as_row(model: Any, row: Row) -> Iterator[None]:
    """While open, the model is that of a row. Afterwards it is what it was: modules that its method had added come back
    with their weights.

    Raises:
        ModelError: it cannot take the attention or the decode section.
    """
    attention, decode = parse_attention(recorded(model)["attention"]), recorded_section(model)
    try:
        put(model, row.attention, row.decoding)
        yield
    finally:
        if row.attention.config is not None:
            sparsify(model, attention)
        set_decode(model, decode)


def recorded(model: Any) -> dict[str, Any]:
    """What a model records of its attention."""
    record: dict[str, Any] = model.config.sparsetrain
    return record


def recorded_section(model: Any) -> Decode | None:
    """The decode section that a model records."""
    section = recorded(model).get("decode")
    return None if section is None else parse_decode(section)
