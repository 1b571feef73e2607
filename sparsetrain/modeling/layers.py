"""Which layers of a model take an attention method, and which models cannot take one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import attention_kind, check_composition
from sparsetrain.generation.settings import Decode, parse_decode
from sparsetrain.methods.base import DenseLayerRule, Method, MethodConfig
from sparsetrain.methods.installed import INSTALLED
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling.attention.documents import guard_documents
from sparsetrain.modeling.attention.interface import ATTENTION_NAME
from sparsetrain.modeling.attention.name import guard_name
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.cache_hooks import keep_memory, refuse_unused_cache
from sparsetrain.modeling.continuous_batching import refuse_continuous_batching
from sparsetrain.modeling.decoder import decoder_holding
from sparsetrain.modeling.records import DECODE, PACKAGE, RECORD_FORMAT
from sparsetrain.modeling.rotary import rotate_each_document
from sparsetrain.version import __version__

UNSUPPORTED_INPUTS = {
    "position_bias": "adds a bias by position to the logits",
    "indices": "selects keys by itself",
    "block_indices": "selects key blocks by itself",
}
"""What some models pass to their attention and no method here honours."""

Model = TypeVar("Model", bound=nn.Module)


def sparsify(model: Model, attention: Mapping[str, Any] | MethodConfig) -> Model:
    """Put an attention method into a Hugging Face decoder, in place.

    The choice is recorded in ``model.config.sparsetrain``, so ``save_pretrained`` keeps it; plain transformers ignores
    the record and loads the folder as the dense model it was; :func:`~sparsetrain.load` puts the method back in. A
    model that has a method already takes the new one instead.

    Args:
        model: any decoder whose attention goes through transformers' attention registry; PEFT-wrapped ones too.
        attention: the ``attention`` section of a recipe, such as ``{"method": "power", "block": 256, "window": 5}``.

    Returns:
        The same model.

    Raises:
        ModelError: the method does not exist, a parameter is wrong, or this model cannot take it; the message says why.
    """
    config = parse_attention(attention)
    modules = _attention_modules(model)
    text_config = modules[0].config
    decoder = decoder_holding(model, modules)
    if decoder is None:
        raise ModelError(f"{type(model).__name__} holds no transformers model that owns its attention layers")
    plans = _plan_layers(decoder, modules, text_config, config)
    decode = _own_decode(plans, config)
    if decode is not None:
        taken = check_composition(((plan.index, attention_kind(plan.method, plan.window)) for plan in plans), decode)
        plans = [replace(plan, decode=decode if plan.index in taken else None) for plan in plans]

    owner = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text_config), None)
    if owner is None:
        raise ModelError(f"{type(model).__name__} holds no transformers model that has the config of its decoder")
    owner.set_attn_implementation(ATTENTION_NAME)
    refuse_continuous_batching(model, modules[0])
    refuse_unused_cache(model)
    for module, plan in zip(modules, plans, strict=True):
        put_method(module, plan)
        guard_name(module)
    guard_documents(decoder, leaks=plans[0].leaks_between_documents)
    rotate_each_document(decoder)
    package = INSTALLED.package_of(config.method)
    model.config.sparsetrain = {  # type: ignore[union-attr]
        "format": RECORD_FORMAT,
        "version": __version__,
        "attention": config.model_dump(mode="json"),
        **({} if package is None else {PACKAGE: package}),
        **({} if decode is None else {DECODE: decode.model_dump(mode="json", exclude={"calibrated"})}),
    }
    return model


def _own_decode(plans: list[LayerPlan], config: MethodConfig) -> Decode | None:
    """The decode section that the layers are trained for; None where the method has none."""
    section = config.decode_section()
    if section is None:
        return None
    dense = [plan.index for plan in plans if plan.method is None and plan.window is None]
    return parse_decode({**section, "dense_layers": dense})


def put_method(module: nn.Module, plan: LayerPlan) -> None:
    """Put a layer's plan in the place of the one it had."""
    old: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
    if old is not None and old.method is not None:
        old.method.detach(module)
    setattr(module, PLAN_ATTRIBUTE, plan)
    if plan.method is not None:
        plan.method.attach(module, plan.index)
    keep_memory(module, plan)


def sparse_layers(model: nn.Module) -> list[tuple[int, nn.Module, Method | None]]:
    """The attention layers of a sparsified model: index, module, and method (None where the layer keeps its own).

    Empty for a model that was never sparsified.
    """
    planned = [(getattr(m, PLAN_ATTRIBUTE), m) for m in model.modules() if hasattr(m, PLAN_ATTRIBUTE)]
    return sorted(((plan.index, module, plan.method) for plan, module in planned), key=lambda layer: layer[0])


def new_modules(model: nn.Module, attention: MethodConfig | None = None) -> dict[str, nn.Module]:
    """The modules that the attention method has added to a model, by name.

    Args:
        attention: the method's config; by default the one recorded in the model's.
    """
    if attention is None:
        config: Any = model.config
        attention = parse_attention(config.sparsetrain["attention"])
    layers = {id(layer) for _, layer, _ in sparse_layers(model)}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if id(module) in layers:
            children = dict(module.named_children())
            found |= {f"{name}.{child}": children[child] for child in attention.new_modules if child in children}
    return found


def attention_density(model: nn.Module, length: int) -> list[float]:
    """Share of the causal pairs of ``length`` tokens that each attention layer of a sparsified model attends to."""
    return [_density(getattr(module, PLAN_ATTRIBUTE), length) for _, module, _ in sparse_layers(model)]


def _density(plan: LayerPlan, length: int) -> float:
    if plan.method is not None:
        return plan.method.density(length)
    if plan.window is None or plan.window >= length:
        return 1.0
    pairs = plan.window * length - plan.window * (plan.window - 1) // 2
    return pairs / (length * (length + 1) // 2)


def _attention_modules(model: nn.Module) -> list[Any]:
    """The decoder's attention modules by layer, or the reason why there are none to replace."""
    name = type(model).__name__
    model_config = getattr(model, "config", None)
    if not isinstance(model_config, PreTrainedConfig):
        raise ModelError(f"{name} is not a transformers model: it has no config")
    if model_config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder; only decoder-only models can take an attention method")

    layered: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    registered = [m for m in layered if "ALL_ATTENTION_FUNCTIONS" in _forward_code(m).co_names]
    modules = sorted((m for m in registered if getattr(m, "is_causal", True)), key=lambda m: m.layer_idx)
    if not registered:
        raise ModelError(
            f"the attention of {name} does not go through transformers' attention registry, so it cannot be replaced"
        )
    if not modules:
        raise ModelError(f"{name} attends in both directions (an encoder); only causal decoders can take a method")
    if len({id(m.config) for m in modules}) > 1:
        raise ModelError(f"{name} holds several decoders; sparsify the one that is meant by itself")
    indices = [m.layer_idx for m in modules]
    if len(set(indices)) < len(indices):
        raise ModelError(f"{name} has more than one attention module in a layer (cross-attention?); not supported")

    text_config = modules[0].config
    if getattr(text_config, "kv_lora_rank", None):
        raise ModelError(
            f"{name} uses latent attention (kv_lora_rank={text_config.kv_lora_rank}), which compresses keys and "
            "values; its attention cannot be replaced"
        )
    for module in modules:
        for argument in UNSUPPORTED_INPUTS.keys() & _constants(module):
            raise ModelError(f"{type(module).__name__} {UNSUPPORTED_INPUTS[argument]} ({argument}); not supported")
    return modules


def _plan_layers(decoder: nn.Module, modules: list[Any], text_config: Any, config: MethodConfig) -> list[LayerPlan]:
    """What each layer does: take the method, or stay as the model made it."""
    name, num_layers = type(decoder).__name__, text_config.num_hidden_layers
    indices = {m.layer_idx for m in modules}
    dense = config.resolve_dense_layers(num_layers)
    if not isinstance(config.dense_layers, DenseLayerRule) and dense - indices:
        raise ModelError(f"attention.dense_layers names layer {min(dense - indices)}, which has no attention in {name}")
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types and "chunked_attention" in layer_types:
        raise ModelError(f"{name} has layers with chunked attention, which are not supported")

    masks_windows = "create_sliding_window_causal_mask" in _forward_code(decoder).co_names
    windows = [_window(module, text_config, layer_types, masks_windows) for module in modules]
    takes = [
        module.layer_idx not in dense and (window is None or config.replace_sliding_layers)
        for module, window in zip(modules, windows, strict=True)
    ]
    # Full attention is the model as it came, so there it is no mistake if nothing changes.
    if not any(takes) and config.method != "full":
        sliding = sum(window is not None for window in windows)
        raise ModelError(
            f"no layer of {name} would take {config.method}: of {len(modules)} attention layers, {sliding} use a "
            f"sliding window of their own and {len(dense)} are in attention.dense_layers; to replace the sliding "
            "windows, set attention.replace_sliding_layers: true"
        )
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    method, position = config.build(num_kv_heads), count()
    leaks = len(modules) < num_layers or any(isinstance(m, nn.Conv1d) for m in decoder.modules())
    return [
        LayerPlan(module.layer_idx, method.of_layer(next(position)) if take else None, window, leaks)
        for module, window, take in zip(modules, windows, takes, strict=True)
    ]


def _window(module: Any, text_config: Any, layer_types: list[str] | None, masks_windows: bool) -> int | None:
    """The sliding window this layer asks for, in the call of its attention function or in the mask alone."""
    if layer_types:
        slides = layer_types[module.layer_idx] == "sliding_attention"
    else:
        slides = getattr(module, "is_sliding", True)
    asks = masks_windows or "sliding_window" in _constants(module) | set(_forward_code(module).co_names)
    window = getattr(module, "sliding_window", getattr(text_config, "sliding_window", None))
    return window if slides and (asks or layer_types) else None


def _forward_code(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward).__code__


def _constants(module: nn.Module) -> set[str]:
    """The strings in a module's forward, among them the names of the keyword arguments it passes on."""
    constants = _forward_code(module).co_consts
    flat = (item for constant in constants for item in (constant if isinstance(constant, tuple) else (constant,)))
    return {item for item in flat if isinstance(item, str)}
