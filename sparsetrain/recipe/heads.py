"""Over how many ranks a sequence can be shared: Ulysses gives every rank whole heads."""

from __future__ import annotations

from sparsetrain.recipe.local_model import model_config
from sparsetrain.recipe.schema import ModelSection


def attention_heads(section: ModelSection) -> tuple[int, int] | None:
    """Query heads and key/value heads of a model, None where its config is not on this machine."""
    config = model_config(section) | section.config_overrides
    text_config = config.get("text_config")
    config = config | text_config if isinstance(text_config, dict) else config
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    return (heads, kv_heads) if isinstance(heads, int) and isinstance(kv_heads, int) else None


def shares_heads(parallel: int, heads: int, kv_heads: int) -> bool:
    """Whether ``parallel`` ranks can have equally many query heads and the key/value heads that these read: several
    whole ones, or a copy of one that is also another rank's."""
    return heads % parallel == 0 and (kv_heads % parallel == 0 or parallel % kv_heads == 0)


def heads_fault(parallel: int, heads: int, kv_heads: int) -> str | None:
    """Why ``sequence.parallel`` does not suit a model, with the values that do; None if it does."""
    if shares_heads(parallel, heads, kv_heads):
        return None
    fitting = [str(size) for size in range(1, heads + 1) if shares_heads(size, heads, kv_heads)]
    return (
        f"{parallel} ranks cannot share a sequence of a model with {heads} query and {kv_heads} key/value heads: each "
        f"needs whole query heads, and whole key/value heads or a copy of one; {', '.join(fitting)} can. To fit longer "
        "rows on one rank: train.activation_checkpointing, train.offload_activations, train.mlp_chunk, deepspeed.stage"
    )
