"""Find the linear layers and expert weights of the text decoder that ``lora.targets`` selects."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import RecipeError
from sparsetrain.modeling.decoder import decoder_modules
from sparsetrain.modeling.layers import new_modules, sparse_layers
from sparsetrain.recipe.lora_targets import layers_named, no_layer, tied_head

if TYPE_CHECKING:
    from sparsetrain.recipe.lora_section import LoraSection

KNOWS_PARAMETERS = "0.17"
"""The first version of peft that can adapt a parameter outside of linear layers."""


@dataclass(frozen=True)
class AdapterTargets:
    """Names of the modules and parameters that get an adapter."""

    linear: dict[str, nn.Module]
    """Linear layers."""
    parameters: dict[str, nn.Parameter]
    """Weights that peft adapts as parameters: stacked expert weights ``[experts, ., .]``, and linear layers beside them
    that peft would mistake for experts because of their names."""


def adapter_targets(model: PreTrainedModel, lora: LoraSection) -> AdapterTargets:
    """The targets that ``lora.targets`` selects in a sparsified model.

    Vision or audio towers, and the modules that the method adds, are never selected.

    Raises:
        RecipeError: ``lora.targets`` matches nothing or a tied head, or peft cannot adapt the experts as configured.
    """
    inside = _decoder(model)
    linear = {name: module for name, module in inside.items() if isinstance(module, nn.Linear | Conv1D)}
    experts = {
        f"{path}.{name}": parameter
        for path, module in inside.items()
        if not type(module).__module__.startswith("torch.nn")
        for name, parameter in module.named_parameters(recurse=False)
        if _is_of_experts(module, name, parameter)
    }
    rule, kind, head = lora.targets, type(model).__name__, model.get_output_embeddings()
    every = linear | experts
    if rule == "attention":
        attention = {id(part) for _, layer, _ in sparse_layers(model) for part in layer.modules()}
        chosen = {name for name, layer in linear.items() if id(layer) in attention}
    elif rule == "linear":
        chosen = {name for name, target in every.items() if target is not head}
    else:
        chosen = layers_named(rule, every, kind)
    if not chosen:
        raise no_layer(str(rule), every, kind)
    if has_tied_head(model) and any(every[name] is head for name in chosen):
        raise tied_head()
    renamed = _taken_for_experts(model, chosen & linear.keys())
    targets = AdapterTargets(
        {name: layer for name, layer in linear.items() if name in chosen - renamed},
        {name: weight for name, weight in experts.items() if name in chosen}
        | {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in sorted(renamed)},
    )
    if targets.parameters:
        _check_experts(targets, lora)
    return targets


def norms_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The normalisation modules of the decoder by name, recognised by their class names."""
    return {
        name: module
        for name, module in _decoder(model).items()
        if "norm" in type(module).__name__.lower() and not list(module.children()) and list(module.parameters())
    }


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output head shares its weight with the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _decoder(model: PreTrainedModel) -> dict[str, nn.Module]:
    added = {id(inner) for new in new_modules(model).values() for inner in new.modules()}
    return {name: module for name, module in decoder_modules(model).items() if id(module) not in added}


def _is_of_experts(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    # Dbrx stacks the experts' matrices into one of two dimensions.
    stacked = parameter.ndim == 2 and "expert" in type(module).__name__.lower() and "bias" not in name
    return parameter.is_floating_point() and (parameter.ndim == 3 or stacked)


def _taken_for_experts(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Linear layers that peft would skip, because it mistakes them by name for experts of transformers 4.

    These are dense layers and shared experts of families whose experts had layers of the same names.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older ones convert nothing
        return set()
    taken: set[str] = set()
    for name in sorted(names):
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # the other weight of a fused pair is missing
            taken.add(name)
        else:
            taken |= {name} - set(config.target_modules or ())
    return taken


def _check_experts(targets: AdapterTargets, lora: LoraSection) -> None:
    some = min(targets.parameters)
    fix = "or set lora.targets to attention, or to linear layers that are not experts"
    stacked = [name for name, weight in targets.parameters.items() if weight.ndim == 2 and not name.endswith(".weight")]
    if stacked:
        raise RecipeError(
            f"lora.targets: the experts are stacked in {stacked[0]}, which the model reads from outside of the module, "
            "so peft cannot adapt it; set lora.targets to attention, or name linear layers"
        )
    if Version(importlib.metadata.version("peft")) < Version(KNOWS_PARAMETERS):
        raise RecipeError(f"lora.targets: adapters for {some} need peft {KNOWS_PARAMETERS}; upgrade it, {fix}")
    for name, given in (("dropout", lora.dropout), ("dora", lora.dora)):
        if given:
            raise RecipeError(
                f"lora.{name}={given}: peft does not support this for expert weights ({some}); set it to "
                f"{'0' if name == 'dropout' else 'false'}, {fix}"
            )
    if any(isinstance(layer, Conv1D) for layer in targets.linear.values()):
        raise RecipeError(
            f"lora.targets: adapters for {some} cannot be combined with adapters of transposed layers; {fix}"
        )
