"""Which parameters a run trains: all of them, adapters beside frozen weights, or the method's new modules alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.modeling.layers import new_modules
from sparsetrain.recipe.schema import Recipe


def choose_trainable(model: PreTrainedModel, recipe: Recipe) -> str:
    """Freeze what the recipe does not train and put its adapters in; say what is trained.

    Raises:
        RecipeError: the adapters have nothing to attach to.
    """
    lora = recipe.lora
    if lora is not None:
        # Equal adapters on every rank, whatever was drawn before.
        torch.manual_seed(recipe.train.seed)
        add_adapters(model, lora)
        what = f"LoRA of rank {lora.rank}"
    elif recipe.train.parameters == "new_modules":
        added = {id(p) for new in new_modules(model).values() for p in new.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in added)
        what = f"the {', '.join(recipe.attention.new_modules)} of each layer alone"
    else:
        frozen = _freeze_other_senses(model)
        what = f"the language model without {', '.join(frozen)}, which no text reaches" if frozen else "everything"
    trained, all_of_them = trainable_size(model), total_size(model)
    return f"trained: {what}, {trained:,} of {all_of_them:,} parameters ({trained / all_of_them:.2%})"


def _freeze_other_senses(model: PreTrainedModel) -> list[str]:
    """Freeze what reads images or sound in a model that also does: text gives it no gradient.

    Returns:
        The names of the modules.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    reached = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in reached}
    for parameter in others.values():
        parameter.requires_grad_(False)
    return sorted({name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] for name in others})


def total_size(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(map(_size, model.parameters()))


def trainable_size(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _size(parameter: nn.Parameter) -> int:
    """Elements of a parameter; bitsandbytes packs two 4-bit ones into a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
