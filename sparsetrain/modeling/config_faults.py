"""Find invalid values of a transformers config that its class accepts because their type is right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsetrain.modeling.unread_fields import unread_fields
from sparsetrain.nearest import did_you_mean

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Fields that set the tensor sizes of a decoder."""

SIZES = (*SHAPE, "max_position_embeddings")
"""Fields whose value must be at least 1."""

LARGEST = {"num_hidden_layers": 10_000, "num_attention_heads": 100_000, "head_dim": 2**20, "hidden_size": 2**24}
"""Upper limits: a larger number is a mistake, and building the model would take too long."""
LARGEST_SIZE = 2**40


def config_faults(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the field and the fault of each invalid value of a config or of its decoder's config."""
    decoder = config.get_text_config(decoder=True)
    if not isinstance(decoder, PreTrainedConfig):
        name = next(name for name, value in vars(config).items() if value is decoder)
        yield (
            name,
            f"{name}={decoder!r:.60}: a model of model_type={config.model_type} has no such sub-config; leave it out",
        )
        return
    for part in (decoder,) if decoder is config else (config, decoder):
        yield from _wrong_sizes(_fields(part))
    fields = _fields(decoder)
    yield from _wrong_numbers(fields)
    yield from _wrong_activation(fields)
    yield from _wrong_rope(decoder)
    yield from _wrong_tokens(fields)
    yield from unread_fields(decoder, fields)


def _fields(config: Any) -> dict[str, Any]:
    """The values of a config under the names that all families share. Not its attributes, which may differ by layer."""
    values: dict[str, Any] = config.to_dict()
    return values | {common: values[own] for common, own in type(config).attribute_map.items() if own in values}


def _wrong_sizes(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in SIZES:
        value, limit = fields.get(name), LARGEST.get(name, LARGEST_SIZE)
        if isinstance(value, int) and not 1 <= value <= limit:
            yield name, f"{name}={value} is not between 1 and {limit}"
    window = fields.get("sliding_window")
    if isinstance(window, int) and window < 0:  # some families write 0 for none
        yield "sliding_window", f"sliding_window={window} is below 0"
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        yield (
            "num_key_value_heads",
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; every key/value head serves "
            "equally many query heads",
        )


def _wrong_numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            yield name, f"{name} is not a number (NaN)"
        elif name.endswith(("_eps", "_epsilon")) and not 0 <= value < 1:
            yield name, f"{name}={value} is not at least 0 and below 1"
        elif (name.endswith("dropout") or name.endswith("pdrop")) and not 0 <= value <= 1:
            yield name, f"{name}={value} is a probability: it must be between 0 and 1"
        elif name == "initializer_range" and not 0 <= value <= 100:
            yield name, f"{name}={value} is a standard deviation: it must be between 0 and 100"


def _wrong_activation(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = fields.get(name)
        if isinstance(value, str) and value not in ACT2FN:
            yield name, f"{name}={value!r} is not an activation that transformers knows{did_you_mean(value, ACT2FN)}"


def _wrong_rope(config: Any) -> Iterator[tuple[str, str]]:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    for kind, each in (nested or {"": parameters}).items():
        where = f"rope_parameters.{kind}." if kind else "rope_parameters."
        rope_type = each.get("rope_type")
        if rope_type == "default" and "factor" in each:
            yield "rope_parameters", f"{where}factor={each['factor']!r:.60} has no effect with rope_type=default"
        own = hasattr(config, f"_validate_{rope_type}_rope_parameters")
        named = isinstance(rope_type, str) and (rope_type in ROPE_INIT_FUNCTIONS or own)
        if rope_type not in (None, "default") and not named:
            names = ["default", *ROPE_INIT_FUNCTIONS]
            yield (
                "rope_parameters",
                f"{where}rope_type={rope_type!r} is not one of {', '.join(names)}{did_you_mean(rope_type, names)}",
            )
        for name, least, most in (
            ("rope_theta", 0, math.inf),
            ("factor", 1, math.inf),
            ("partial_rotary_factor", 0, 1),
            ("original_max_position_embeddings", 1, math.inf),
        ):
            value: Any = each.get(name)
            if name not in each or (value is None and name != "rope_theta"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value <= most or value in (0, math.inf):
                bound = ("of at least 1" if least else "above 0") + (" and at most 1" if most == 1 else "")
                yield "rope_parameters", f"{where}{name}={value!r:.60} is not a number {bound}"
        for fault in _wrong_scaling(each):
            yield "rope_parameters", where + fault


ROPE_ORDER = (("llama3", "low_freq_factor", "high_freq_factor"), ("yarn", "beta_slow", "beta_fast"))
"""For each kind of scaling, two fields of which the first must be smaller than the second."""


def _wrong_scaling(rope: Mapping[str, Any]) -> Iterator[str]:
    """Faults that transformers only warns about, although they make its results meaningless."""
    ordered = {name for _, *pair in ROPE_ORDER for name in pair}
    for name in sorted({"attention_factor", *ordered} & rope.keys()):
        if rope[name] is not None and not _is_factor(rope[name]):
            yield f"{name}={rope[name]!r:.60} is not a number above 0"
    for kind, low, high in ROPE_ORDER:
        given: tuple[Any, Any] = rope.get(low), rope.get(high)
        if rope.get("rope_type") == kind and all(map(_is_factor, given)) and given[0] >= given[1]:
            yield f"{low}={given[0]} is not below {high}={given[1]}"
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        # A single number would silently be broadcast to all pairs; other lengths do not fit.
        if name in rope and not (isinstance(factors, list) and len(factors) > 1 and all(map(_is_factor, factors))):
            yield f"{name}={factors!r:.60} is not a list of numbers above 0, one for each pair of rotated channels"


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _wrong_tokens(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Negative ids. Ids beyond the vocabulary are common in small models, and transformers warns about them."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        if value == []:
            yield name, f"{name}=[] names no token; use null for none"
        for token in value if isinstance(value, list) else [value]:
            # Some models on the Hub write -1 for none.
            if isinstance(token, int) and token < (-1 if name == "pad_token_id" else 0):
                yield name, f"{name}={token} is not a token id"
