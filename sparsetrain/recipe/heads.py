"""The numbers of ranks that can share a sequence: in Ulysses every rank has whole heads and a part of the positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsetrain.recipe.local_model import decoder_config
from sparsetrain.recipe.schema import ModelSection


def attention_heads(section: ModelSection) -> tuple[int, int] | None:
    """The numbers of query heads and key/value heads of a model; None if its config is not on this machine."""
    config = decoder_config(section)
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or min(heads, kv_heads) < 1:
        return None  # building the model reports invalid values
    return heads, kv_heads


def shares_heads(parallel: int, heads: int, kv_heads: int) -> bool:
    """Whether the heads can be divided among ``parallel`` ranks: the same number of query heads on each rank, and whole
    key/value heads or copies of them."""
    return heads % parallel == 0 and (kv_heads % parallel == 0 or parallel % kv_heads == 0)


def heads_fault(parallel: int, heads: int, kv_heads: int) -> str | None:
    """The reason why a model does not support ``sequence.parallel``, with valid values; None if it does."""
    if shares_heads(parallel, heads, kv_heads):
        return None
    fitting = [str(size) for size in range(1, heads + 1) if shares_heads(size, heads, kv_heads)]
    return (
        f"{parallel} ranks cannot share a sequence of a model with {heads} query and {kv_heads} key/value heads: each "
        f"needs whole query heads, and whole key/value heads or a copy of one; {', '.join(fitting)} can. To fit longer "
        "rows on one rank: train.activation_checkpointing, train.offload_activations, train.mlp_chunk, deepspeed.stage"
    )


def rotary_fault(parameters: Any) -> str | None:
    """The reason why a config's rope parameters do not allow sequence parallelism; None if they do."""
    for kind in _rope_types(parameters):
        if kind in ("longrope", "su") or "dynamic" in kind:
            return (
                f"the rotary embedding of the model ({kind}) depends on the longest position it sees, which differs "
                "between ranks; set it to 1"
            )
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    """The ``rope_type`` (in older configs ``type``) of rope parameters, which some models have per layer type."""
    if isinstance(parameters, dict):
        for name in ("rope_type", "type"):
            if isinstance(parameters.get(name), str):
                yield parameters[name]
        for inner in parameters.values():
            yield from _rope_types(inner)


def positions_fault(length: int, limit: Any) -> str | None:
    """The reason why rows of ``length`` exceed a model's positions; None if they do not, or the limit is unknown."""
    if not isinstance(limit, int) or length <= limit:
        return None
    return (
        f"{length} is beyond the model's max_position_embeddings={limit}; to train it for longer contexts, set "
        f"model.config_overrides={{max_position_embeddings: {length}}} (a table of learned positions cannot grow: "
        f"there, rows end at {limit})"
    )
