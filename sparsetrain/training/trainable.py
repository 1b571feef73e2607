"""Choose the trained parameters: all, adapters with frozen weights, or only the method's new modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.modeling.continued import continue_start
from sparsetrain.modeling.decoder import decoder_modules, freeze_towers
from sparsetrain.modeling.layers import new_modules
from sparsetrain.recipe.freezing import frozen
from sparsetrain.recipe.schema import Recipe


def choose_trainable(model: PreTrainedModel, recipe: Recipe) -> str:
    """Freeze the parameters that the recipe does not train, and add its adapters; returns a description.

    Raises:
        RecipeError: ``lora.targets`` or a name in ``train.freeze`` matches nothing.
    """
    lora = recipe.lora
    if lora is not None:
        # Seed here, so that adapters are equal on every rank.
        torch.manual_seed(recipe.train.seed)
        add_adapters(model, lora)
        if recipe.train.start is not None:
            continue_start(model, recipe.train.start, lora)
        what = f"LoRA of rank {lora.rank} beside {adapted_share(model):.0%} of the decoder's weights"
        what += "" if recipe.train.start is None else f", begun with the adapters in {recipe.train.start}"
    elif recipe.train.parameters == "new_modules":
        added = {id(p) for new in new_modules(model).values() for p in new.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in added)
        what = f"only the {', '.join(recipe.attention.new_modules)} of each layer"
    else:
        towers = freeze_towers(model)
        what = f"the language model without {', '.join(towers)}, which text does not use" if towers else "everything"
        if recipe.train.freeze:
            freeze(model, recipe.train.freeze)
            what += f" but {', '.join(recipe.train.freeze)}"
    trained, all_of_them = trainable_size(model), total_size(model)
    return f"trained: {what}, {trained:,} of {all_of_them:,} parameters ({trained / all_of_them:.2%})"


def freeze(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Freeze the parameters that ``train.freeze`` names; one that has two names (a tied head) by either.

    Raises:
        RecipeError: A name matches no parameter.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for path in frozen(named, names, type(model).__name__):
        named[path].requires_grad_(False)


def adapted_share(model: PreTrainedModel) -> float:
    """The fraction of the decoder's matrices (without embedding and head) that have an adapter."""
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    modules = decoder_modules(model).values()
    inside = [module for module in modules if module is not head and not isinstance(module, nn.Embedding)]
    own = {id(p): p for module in inside for name, p in module.named_parameters(recurse=False) if p.ndim > 1}
    for module in inside:
        if isinstance(module, LoraLayer):
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                own.pop(id(part.weight), None)
    adapted = {
        id(weight): weight
        for module in inside
        if isinstance(module, LoraLayer)
        for weight in [getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))]
    }
    return sum(map(_size, adapted.values())) / max(1, sum(map(_size, own.values())))


def total_size(model: nn.Module) -> int:
    """Number of parameters of a model."""
    return sum(map(_size, model.parameters()))


def trainable_size(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _size(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter; bitsandbytes packs two 4-bit elements into a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
