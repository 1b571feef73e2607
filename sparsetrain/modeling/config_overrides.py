"""``model.config_overrides``: merge the recipe's fields into the values of a model's config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from sparsetrain.errors import ModelError
from sparsetrain.nearest import did_you_mean

OVERRIDES = "model.config_overrides"

ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
"""The names of the rotary parameters in old and new configs; transformers converts all of them to the first."""

ELSEWHERE = {
    "model_type": "the files decide the family; choose another model.path",
    "architectures": "the files decide the class; choose another model.path",
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "sparsetrain": "the attention section of the recipe chooses the method",
    "auto_map": "the model's files decide which code it brings",
    "transformers_version": "it only records which version wrote the file",
}
"""Fields that a recipe cannot override, and the reason."""


PARTIAL = "partial_rotary_factor"
ROPE_NAMES = (frozenset(RopeParameters.__annotations__) | {"type", "truncate", "mscale", "mscale_all_dim"}) - {PARTIAL}
"""Rotary parameters that every family accepts. Some families have more, such as the rotated fraction of each head;
their config class declares them."""


def check_name(name: str, value: Any, config: Any, section: str) -> None:
    """Refuse a field that the config's class does not have, also within sub-configs and rotary parameters.

    Args:
        section: The section of the recipe, for the message.

    Raises:
        ModelError: The field is unknown; names the most similar known field.
    """
    if name in ELSEWHERE:
        raise ModelError(f"{section}.{name} cannot be set here: {ELSEWHERE[name]}")
    if name not in (known := known_fields(config)):
        raise ModelError(f"{section}.{name}: {type(config).__name__} has no such field{did_you_mean(name, known)}")
    inner = getattr(config, name, None)
    if not isinstance(value, dict):
        return
    if isinstance(inner, PreTrainedConfig):
        for each, of_it in value.items():
            if each != "model_type":
                check_name(each, of_it, inner, f"{section}.{name}")
    elif name in ("rope_parameters", "rope_scaling"):
        present = inner if isinstance(inner, dict) else {}
        known = set(ROPE_NAMES) | present.keys() | set(getattr(config, "layer_types", None) or ())
        known |= {each for kind in present.values() if isinstance(kind, dict) for each in kind}
        for each, of_it in value.items():
            for strange in {each, *(of_it if isinstance(of_it, dict) else ())} - known:
                raise ModelError(
                    f"{section}.{name}: {strange!r} is not a parameter of rotary positions"
                    f"{did_you_mean(strange, known)}"
                )


def known_fields(config: Any) -> set[str]:
    """The fields that a config's class declares, and those that its files contain."""
    names = {*config.to_dict(), *type(config).attribute_map}
    if dataclasses.is_dataclass(config):
        names |= {field.name for field in dataclasses.fields(config)}
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
        names |= set(ROPE) - ({PARTIAL} if not any(PARTIAL in kind for kind in kinds) else set())
    return {name for name in names if not name.startswith("_")}


def overridden(
    values: Mapping[str, Any], config: Any, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge overrides into the values of a config, or into its text config in a multimodal model.

    A mapping is merged into the existing one, so that a new factor in ``rope_parameters`` keeps its theta.

    Args:
        values: The values of the config.
        config: The config that these values make.

    Returns:
        The merged values, and for each overridden field where it was set.

    Raises:
        ModelError: The config has no such field.
    """
    decoder = config.get_text_config(decoder=True)
    part = next((name for name in config.sub_configs if getattr(config, name, None) is decoder), None)
    result = copy.deepcopy(dict(values))
    places: dict[str, str] = {}
    rope: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    if part is not None:
        inner = result[part] = dict(result.get(part) or {})
    for given, value in overrides.items():
        outside = part is None or given in known_fields(config) or given in ELSEWHERE
        owner, target = (config, result) if outside else (decoder, inner)
        check_name(given, value, owner, OVERRIDES)
        name = type(owner).attribute_map.get(given, given)
        if given in ROPE and isinstance(getattr(owner, "rope_parameters", None), dict):
            rope[given], name = value, "rope_parameters"
        else:
            for alias in [alias for alias, real in type(owner).attribute_map.items() if real == name]:
                target.pop(alias, None)
            target[name] = _merged(target.get(name), value)
        places[name if outside else str(part)] = places[name] = f"{OVERRIDES}.{given}"
    if rope:
        outside = isinstance(getattr(config, "rope_parameters", None), dict)
        owner, target = (config, result) if outside else (decoder, inner)
        parameters = _rope(owner, rope, overrides)
        for name in ROPE:
            target.pop(name, None)
        target["rope_parameters"] = parameters
    return result, places


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    return {**below, **{name: _merged(below.get(name), value) for name, value in above.items()}}


def _rope(owner: Any, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The rotary parameters of a config merged with those of the recipe, under their current names."""
    present = copy.deepcopy(owner.rope_parameters)
    kinds = [name for name, value in present.items() if isinstance(value, dict)]
    for name in ("rope_scaling", "rope_parameters"):
        if name not in given:
            continue
        value = _rope_mapping(name, given[name])
        if not kinds:
            present = _with_parameters(present, value, owner, overrides)
            continue
        if strange := value.keys() - set(kinds):
            raise ModelError(
                f"{OVERRIDES}.{name}.{min(strange, key=str)}: this model has separate rotary parameters for "
                f"each layer type; give those of {' or '.join(kinds)}"
            )
        for kind, inner in value.items():
            if not isinstance(inner, dict):
                raise ModelError(f"{OVERRIDES}.{name}.{kind}={inner!r:.100} is not a mapping")
            present[kind] = _with_parameters(present[kind], inner, owner, overrides)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in given:
            for parameters in [present[kind] for kind in kinds] or [present]:
                parameters[name] = given[name]
    return present


def _rope_mapping(name: str, value: Any) -> dict[str, Any]:
    """The rotary parameters that a recipe gives under ``name``."""
    if isinstance(value, dict):
        return value
    if name == "rope_scaling" and value is None:
        return {"rope_type": "default"}  # the meaning in older configs
    raise ModelError(f"{OVERRIDES}.{name}={value!r:.100}: the parameters of rotary positions must be a mapping")


def _with_parameters(
    below: dict[str, Any], above: Mapping[str, Any], owner: Any, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    below = {name: value for name, value in below.items() if name != "type"}
    above = dict(above)
    if "type" in above:
        above.setdefault("rope_type", above.pop("type"))
    if above.get("rope_type", below.get("rope_type")) != below.get("rope_type"):
        # Parameters of another kind of scaling do not apply to this one.
        below = {name: below[name] for name in ("rope_theta", "partial_rotary_factor") if name in below}
    result = {**below, **above}
    if result.get("rope_type") in ("yarn", "longrope", "llama3") and "max_position_embeddings" in overrides:
        # Scaling starts from the positions that the model was trained for, not from the target length.
        result.setdefault("original_max_position_embeddings", owner.max_position_embeddings)
    return result
