"""Refuse sizes of a model and its rows that would take hours or all memory before an error appears."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from sparsetrain.recipe.local_model import model_config
from sparsetrain.recipe.schema import Recipe
from sparsetrain.recipe.yaml_source import KeyPath
from sparsetrain.section import MOST_BLOCKS

_BOUNDS = (
    (re.compile(r"layer|block|depth"), 4096, "each is a separate module"),
    (re.compile(r"head(?!_dim)|expert|group"), 2**16, "each has its own weights"),
    (re.compile(r"(_size|_dim|_rank|embd|d_model|d_ff|d_kv)$"), 2**27, "such weights do not fit any machine"),
)
"""Patterns of integer fields in a transformers config, the maximum, and the reason."""

_NOT_A_COUNT = re.compile(r"window|chunk|_id$|_ids$|coef|block_size|_type")


def too_large(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the sizes of the recipe's model and the block counts of its rows that are too large."""
    model = recipe.model
    named: list[tuple[KeyPath, Any]] = [(("model", "config_overrides"), model.config_overrides)]
    if model.architecture is not None:
        named.append((("model", "architecture"), model.architecture))
    elif model.path is not None:
        named.append((("model", "path"), model_config(model)))
    for path, config in named:
        for name, value, most, why in oversized(config):
            where = path if path[-1] == "path" else (*path, *name)
            called = f"{'.'.join(name)} of its config: " if path[-1] == "path" else ""
            yield where, f"{called}expected a number of at most {most:,}, got {value}: {why}"
    yield from _blocks(recipe)


def oversized(
    config: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int, int, str]]:
    """Yield the integers of a transformers config that are too large: path, value, maximum and reason."""
    for name, value in config.items():
        if isinstance(value, dict) and len(above) < 4:
            yield from oversized(value, (*above, str(name)))
        elif isinstance(value, int) and not _NOT_A_COUNT.search(str(name)):
            for pattern, most, why in _BOUNDS:
                if pattern.search(str(name)) and value > most:
                    yield (*above, str(name)), value, most, why
                    break


def _blocks(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    block = getattr(recipe.attention, "block", None)
    evaluated = (lengths for task in recipe.eval.tasks for lengths in task.lengths_by_field().values())
    lengths = [recipe.sequence.length, *chain.from_iterable(evaluated)]
    if block is not None and max(lengths) > block * MOST_BLOCKS:
        yield (
            ("attention", "block"),
            f"a row of {max(lengths):,} tokens would be {-(-max(lengths) // block):,} blocks of {block}, but "
            f"the limit is {MOST_BLOCKS:,}, as there is a list for each; raise it",
        )
