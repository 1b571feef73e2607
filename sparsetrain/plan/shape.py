"""The shape of a model, from its config if it is on this machine, else from a table of public configs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.logits import changes_logits
from sparsetrain.recipe.heads import rotary_fault
from sparsetrain.recipe.local_model import model_folder
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.recipe.sizes import oversized
from sparsetrain.textfile import read_text

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by ``model.dtype``."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a dense decoder of the Llama family."""

    layers: int
    hidden: int
    """Hidden size (of the residual stream)."""
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the gated MLP."""
    vocab: int
    tied: bool
    """Whether the output projection is tied to the input embedding."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (Qwen3)."""
    qkv_bias: bool = False
    """Whether the projections of queries, keys and values have biases (Qwen2)."""
    fused_qkv: bool = False
    """Whether queries, keys and values come from one projection (Phi-3)."""
    fused_gate_up: bool = False
    """Whether gate and up are one projection (Phi-3, GLM)."""
    decoder: str = "model"
    """The path of the decoder in the model."""
    plain_head: bool = True
    """Whether logits are exactly the output projection; otherwise the loss cannot be computed in chunks."""
    rotary_fault: str | None = None
    """The reason why its rotary positions do not allow sequence parallelism; None if they do."""

    def as_config(self) -> dict[str, Any]:
        """A transformers config of this shape."""
        return {
            "model_type": "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
        }

    @property
    def q_width(self) -> int:
        """Elements of a token's queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys; its values have as many."""
        return self.kv_heads * self.head_dim


# layers, hidden, query heads, KV heads, head_dim, intermediate, vocabulary, tied; as in the config.json of each.
_LLAMA_1B = ModelShape(16, 2048, 32, 8, 64, 8192, 128256, True)
_LLAMA_3B = ModelShape(28, 3072, 24, 8, 128, 8192, 128256, True)
_LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False)
_LLAMA_70B = ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False)
_MISTRAL_7B = ModelShape(32, 4096, 32, 8, 128, 14336, 32768, False)
_QWEN3_06B = ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True, qk_norm=True)
_QWEN3_17B = ModelShape(28, 2048, 16, 8, 128, 6144, 151936, True, qk_norm=True)
_QWEN3_4B = ModelShape(36, 2560, 32, 8, 128, 9728, 151936, True, qk_norm=True)
_QWEN3_8B = ModelShape(36, 4096, 32, 8, 128, 12288, 151936, False, qk_norm=True)
_QWEN3_14B = ModelShape(40, 5120, 40, 8, 128, 17408, 151936, False, qk_norm=True)
_QWEN3_32B = ModelShape(64, 5120, 64, 8, 128, 25600, 151936, False, qk_norm=True)

KNOWN_SHAPES: dict[str, ModelShape] = {
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA_3B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "Qwen/Qwen3-0.6B": _QWEN3_06B,
    "Qwen/Qwen3-0.6B-Base": _QWEN3_06B,
    "Qwen/Qwen3-1.7B": _QWEN3_17B,
    "Qwen/Qwen3-1.7B-Base": _QWEN3_17B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-4B-Base": _QWEN3_4B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B,
    "Qwen/Qwen3-14B": _QWEN3_14B,
    "Qwen/Qwen3-14B-Base": _QWEN3_14B,
    "Qwen/Qwen3-32B": _QWEN3_32B,
}
"""Shapes by Hub id, so that a plan needs neither the Hub nor a download."""

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

_TIED = {"tie_word_embeddings": True}
_GEMMA = {"head_dim": 256, "num_key_value_heads": 4, **_TIED}
_COHERE = {"logit_scale": 0.0625, **_TIED}
_GLM = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True}
PLANNED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "ministral": {"num_key_value_heads": 8},
    "ministral3": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 30.0},
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {},
    "smollm3": {"num_key_value_heads": 4, **_TIED},
    "granite": {},
    "olmo2": {},
    "olmo3": {},
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "exaone4": {"num_key_value_heads": 32},
    "glm": _GLM,
    "glm4": _GLM,
    "seed_oss": {"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True},
}
"""The model types that can be planned, with the defaults of their configs."""


def find_shape(section: ModelSection, config_file: Path | None = None) -> ModelShape:
    """The shape of a recipe's model, without the network.

    Looked for in ``config_file``, the recipe's ``model.architecture``, the model's folder, the Hub cache, and the table
    of public configs, in this order. ``model.config_overrides`` are applied.

    Raises:
        ModelError: it is nowhere, or it is no dense decoder with a gated MLP.
    """
    file = config_file or _config_file(section)
    if file is not None:
        return shape_of_config(_read(file), str(file), section.config_overrides)
    if section.architecture is not None:
        return shape_of_config(section.architecture, "model.architecture", section.config_overrides)
    if section.path in KNOWN_SHAPES:
        return shape_of_config(KNOWN_SHAPES[section.path].as_config(), section.path, section.config_overrides)
    raise ModelError(
        f"model.path={section.path}: its shape is not known here. Give its config.json with --config FILE, or download "
        f"that one file: hf download {section.path} config.json"
    )


_FAMILIES = {"meta-llama": "llama", "mistralai": "mistral", "Qwen": "qwen3"}
"""The families of the table of public configs, by who published them."""


def known_config(section: ModelSection) -> dict[str, Any] | None:
    """The config of a model on the Hub as far as it is known on this machine; None if it is not."""
    file = _config_file(section)
    if file is not None:
        return _read(file)
    if section.path not in KNOWN_SHAPES:
        return None
    return KNOWN_SHAPES[section.path].as_config() | {"model_type": _FAMILIES[section.path.partition("/")[0]]}


def shape_of_config(config: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape that a transformers config describes, with the recipe's overrides.

    Raises:
        ModelError: a field is missing or wrong, or the model has parts that a plan does not count.
    """
    changed = overrides or {}
    text = _laid_over(config, changed)
    inner = text.get("text_config")
    if isinstance(inner, dict):
        text |= _laid_over(inner, changed)
    kind = text.get("model_type")
    if any(text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ModelError(f"{origin}: model_type {kind} has experts; a plan counts dense decoders only")
    if missing := [name for name in _NEEDED if text.get(name) is None]:
        raise ModelError(
            f"{origin}: its config has no {', '.join(missing)}; a plan counts decoders of the Llama family "
            f"(Llama, Mistral, Qwen, Gemma, Phi-3), and its model_type is {kind}"
        )
    if not isinstance(kind, str) or kind not in PLANNED:
        raise ModelError(f"{origin}: model_type={kind!r} cannot be planned; {', '.join(PLANNED)} can")
    text = {**PLANNED[kind], **text}
    for name in (*_NEEDED, "num_key_value_heads", "head_dim"):
        value = text.get(name)
        if value is not None and (type(value) is not int or value < 1):
            place = "model.config_overrides" if name in changed else origin
            raise ModelError(f"{place}: {name}={value!r} is not a positive whole number")
    for path, value, most, why in oversized(text):
        place = "model.config_overrides" if path[0] in changed else origin
        raise ModelError(f"{place}: {'.'.join(path)}={value} is above {most:,}: {why}")
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            f"{origin}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; every key/value "
            "head serves equally many query heads"
        )
    if text.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"{origin}: num_attention_heads={heads} does not divide hidden_size={hidden}; change one of them, or give "
            "head_dim"
        )
    return ModelShape(
        layers=text["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=text.get("head_dim") or hidden // heads,
        intermediate=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings")),
        qk_norm=kind in ("qwen3", "gemma3", "gemma3_text", "exaone4"),
        qkv_bias=kind == "qwen2" or bool(text.get("attention_bias")),
        fused_qkv=kind == "phi3",
        fused_gate_up=kind in ("phi3", "glm", "glm4"),
        decoder="model.language_model" if isinstance(inner, dict) else "model",
        rotary_fault=rotary_fault(text.get("rope_parameters") or text.get("rope_scaling")),
        plain_head=not changes_logits(text.get),
    )


def _laid_over(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A config with overrides, mappings merged as at load."""
    merged = {name: {**config[name], **value} for name, value in changed.items() if _are_mappings(config, name, value)}
    return {**config, **changed, **merged}


def _are_mappings(config: Mapping[str, Any], name: str, value: Any) -> bool:
    return isinstance(value, dict) and isinstance(config.get(name), dict)


def _config_file(section: ModelSection) -> Path | None:
    """The config.json of a model's folder, or of the Hub cache; None where it is not on this machine."""
    folder = model_folder(section)
    if folder is not None and (folder / "config.json").is_file():
        return folder / "config.json"
    return None if section.path is None else _cached_config(section.path, section.revision)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(file, str(file), ModelError))
    except RecursionError:
        raise ModelError(f"{file} is nested too deeply for a config") from None
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no transformers config: a JSON object")
    return config


def _cached_config(hub_id: str, revision: str | None) -> Path | None:
    """The config of a model in the Hub cache, found without huggingface_hub, whose import takes longer than a plan."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    config = folder / "snapshots" / commit / "config.json" if commit else None
    return config if config is not None and config.is_file() else None
