"""Build the transformers config of a model from its files or the recipe, apply overrides, and check it."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparsetrain.errors import ModelError
from sparsetrain.modeling.boundary import explained, faulty_value, is_fault
from sparsetrain.modeling.config_faults import SHAPE, config_faults
from sparsetrain.modeling.config_overrides import check_name, overridden
from sparsetrain.modeling.foreign import disarmed
from sparsetrain.modeling.places import resolve, unloadable
from sparsetrain.modeling.side_files import read_object
from sparsetrain.nearest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection

ARCHITECTURE = "model.architecture"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ConfigSource:
    """The values of a config, and where each of them came from."""

    values: dict[str, Any]
    """The values of ``config.json`` or ``model.architecture``, merged with the overrides."""
    origin: str
    """The file or the recipe section that the values come from."""
    places: Mapping[str, str]
    """For each overridden value, where it was set."""
    make: Callable[[dict[str, Any]], Any]
    """Builds a config from values."""

    def config(self) -> Any:
        """Build and check the config.

        Raises:
            ModelError: The family's config class refuses a value, or no model can be built from the config.
        """
        with explained(partial(self.blame, self.make)):
            config = self.make(copy.deepcopy(self.values))
            faults = list(config_faults(config))
        for name, fault in faults:
            raise ModelError(f"{self.place(name)}: {fault}")
        return config

    def skeleton(self, config: Any, **options: Any) -> PreTrainedModel:
        """Build the model without storage for its weights (on the meta device).

        Raises:
            ModelError: It cannot be built; names the value that causes this, if a single one does.
        """

        def build(config: Any) -> Any:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, **options)

        with explained(partial(self.blame, lambda values: build(self.make(values)))):
            model: PreTrainedModel = build(copy.deepcopy(config))
        return model

    def blame(self, build: Callable[[dict[str, Any]], object], error: BaseException) -> str:
        """The location and value of the setting that makes ``build`` raise an error."""
        named = re.match(r"Validation error for field '(\w+)'", str(error))
        if named is not None and named[1] in self.values:
            name: str | None = named[1]
        else:
            # Overrides first: a value of the user is a more likely cause than one that came with the model.
            ordered = {**{name: self.values[name] for name in self.places if name in self.values}, **self.values}
            name = faulty_value(ordered, lambda values: build(copy.deepcopy(values)))
        return self.origin if name is None else f"{self.place(name)}={self.values[name]!r:.200}"

    def place(self, name: str) -> str:
        """The place where a field was set: the file and its name, or the override."""
        if name in self.places:
            return self.places[name]
        return f"{ARCHITECTURE}.{name}" if self.origin == ARCHITECTURE else f"{self.origin}: {name}"


def load_config(section: ModelSection) -> Any:
    """The transformers config of a recipe's model; no weights are read.

    Raises:
        ModelError: The config cannot be read, lacks a field that the recipe sets, or is invalid.
    """
    return config_source(section).config()


def config_source(section: ModelSection) -> ConfigSource:
    """The values of the config of a recipe's model, with their origin.

    Raises:
        ModelError: The config cannot be read, or lacks a field that the recipe sets.
    """
    if section.path is None:
        source = _new_source(section.architecture or {}, section.config_overrides)
    else:
        source = saved_source(
            resolve(section.path, "model.path"),
            "model.path",
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    if not section.config_overrides:
        return source
    values, places = overridden(source.values, source.config(), section.config_overrides)
    return dataclasses.replace(source, values=values, places=places)


def check_overrides(values: Mapping[str, Any], section: ModelSection) -> None:
    """Refuse overrides that the config does not have, or with which no model can be built.

    Args:
        values: The values of a ``config.json``, or the known subset of them.

    Raises:
        ModelError: An override is refused; names it.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return  # a family with custom code
    config_class = CONFIG_MAPPING[kind]
    source = ConfigSource(dict(values), f"config.json of {section.path}", {}, config_class.from_dict)
    values, places = overridden(source.values, source.config(), section.config_overrides)
    dataclasses.replace(source, values=values, places=places).config()


def saved_source(path: str, field: str, **options: Any) -> ConfigSource:
    """The values of the ``config.json`` of a folder or Hub id.

    Args:
        field: The name of the model in error messages.
        options: Options of ``from_pretrained``: where and how to read.
    """
    options.setdefault("trust_remote_code", False)
    file = Path(path) / "config.json"
    origin = str(file) if file.is_file() else f"config.json of {path}"
    where = {name: value for name, value in options.items() if name != "trust_remote_code"}
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, **where)
    except Exception as error:
        if not is_fault(error):
            raise
        if file.is_file():
            read_object(file)  # raises an error that names the file if its JSON is the cause
        raise unloadable(field, path, error) from error
    if not isinstance(values, dict):
        raise ModelError(f"{origin} holds {values!r:.60}, but a config must be an object")
    kind = values.get("model_type")
    trusted, brings_code = bool(options["trust_remote_code"]), "auto_map" in values
    remote = trusted and brings_code
    values = disarmed(values, trust_remote_code=trusted)
    if not remote and "model_type" in values and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise ModelError(
            f"{origin}: model_type={kind!r} is not a family that transformers knows{did_you_mean(kind, CONFIG_MAPPING)}"
            f"{'; it needs custom code, which runs only with trust_remote_code' if brings_code else ''}"
        )

    def make(values: dict[str, Any]) -> Any:
        config = config_class.from_dict(values)
        config._name_or_path = path
        return config

    try:
        config_class = type(AutoConfig.from_pretrained(path, **options))
    except Exception as error:
        if not is_fault(error):
            raise
        # The message names the value that causes the error if the class belongs to transformers.
        if not isinstance(kind, str) or remote or kind not in CONFIG_MAPPING:
            raise unloadable(field, path, error) from error
        config_class = CONFIG_MAPPING[kind]
    return ConfigSource(values, origin, {}, make)


def _new_source(architecture: Mapping[str, Any], overrides: Mapping[str, Any]) -> ConfigSource:
    fields = dict(architecture)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{ARCHITECTURE}.model_type={model_type!r} is unknown{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    for name, value in fields.items():
        check_name(name, value, default, ARCHITECTURE)
    _check_sized({**fields, **overrides}, default)
    # A class's own special tokens belong to another tokenizer.
    none = dict.fromkeys(SPECIAL_TOKENS)
    return ConfigSource(fields, ARCHITECTURE, {}, lambda values: config_class(**{**none, **values}))


def _check_sized(fields: Mapping[str, Any], default: Any) -> None:
    """Refuse an architecture without sizes: the default of a family has billions of parameters."""
    common = {own: name for name, own in type(default).attribute_map.items()}
    parts = {name for name in fields if isinstance(getattr(default, name, None), PreTrainedConfig)}
    if not parts and not {common.get(name, name) for name in fields} & set(SHAPE):
        decoder = default.get_text_config(decoder=True)
        sizes = {name: getattr(decoder, name, None) for name in ("num_hidden_layers", "hidden_size")}
        usual = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ModelError(
            f"{ARCHITECTURE} gives no size, and {type(default).__name__} would be built at its default ({usual}); give "
            f"num_hidden_layers, hidden_size and what else differs"
        )


def take_special_tokens(config: Any, tokenizer: PreTrainedTokenizerBase, architecture: Mapping[str, Any]) -> None:
    """Copy the tokenizer's special tokens into the config of a random model, except those that the recipe sets."""
    for name in SPECIAL_TOKENS:
        if name not in architecture:
            setattr(config, name, getattr(tokenizer, name))


def check_dropout(model: PreTrainedModel) -> None:
    """Refuse attention dropout, which no attention method implements.

    Raises:
        ModelError: The config sets it; names the setting.
    """
    config = model.config.get_text_config(decoder=True)
    for name in ("attention_dropout", "attn_pdrop"):
        if isinstance(share := getattr(config, name, None), float | int) and share > 0:
            raise ModelError(
                f"{name}={share}: attention dropout is not supported; switch it off with "
                f"model.config_overrides={{{name}: 0.0}}"
            )
