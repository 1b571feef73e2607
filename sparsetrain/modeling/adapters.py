"""LoRA through peft: inject adapters into a sparsified model, switch them off, and merge them.

They are injected in place, so that the model stays a transformers model. Modules that are fully trained beside them
(embedding, norms, the modules that the attention method adds) are trained in place too, where peft would train a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsetrain.errors import ModelError
from sparsetrain.modeling.adapter_targets import adapter_targets, has_tied_head, norms_of
from sparsetrain.modeling.layers import new_modules
from sparsetrain.modeling.token_rows import add_token_rows, merge_token_rows, row_layers
from sparsetrain.modeling.vocabulary import added_token_ids

if TYPE_CHECKING:
    from peft import LoraConfig

    from sparsetrain.recipe.lora_section import LoraSection


def has_adapters(model: nn.Module) -> bool:
    """Whether LoRA adapters are in the model."""
    return getattr(model, "peft_config", None) is not None


def add_adapters(model: PreTrainedModel, lora: LoraSection) -> None:
    """Inject LoRA adapters into a sparsified model and freeze all weights but those that ``lora`` trains fully.

    Modules that the method adds stay trainable if the method made them so.

    Raises:
        RecipeError: The targets match no linear layer; the message lists the linear layers.
    """
    from peft import LoraConfig

    targets = adapter_targets(model, lora)
    whole = {name: [p for p in new.parameters() if p.requires_grad] for name, new in new_modules(model).items()}
    if lora.train_norms:
        whole |= {name: list(norm.parameters()) for name, norm in norms_of(model).items()}
    if lora.train_embeddings:
        name, embedding = next((n, m) for n, m in model.named_modules() if m is model.get_input_embeddings())
        whole[name] = list(embedding.parameters())
    rows = added_token_ids(model)
    layers = row_layers(model, embedding=not lora.train_embeddings) if rows else {}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale_numerator,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets.linear) or None,
        target_parameters=sorted(targets.parameters) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.linear.values()),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        modules_to_save=sorted(whole) or None,
        ensure_weight_tying=lora.train_embeddings and has_tied_head(model),
        trainable_token_indices=dict.fromkeys(layers, rows) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path,
    )
    inject(model, config)
    for parameters in whole.values():
        for parameter in parameters:
            parameter.requires_grad_(True)


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the adapters into the base weights in place, which leaves an ordinary model.

    Raises:
        ModelError: The merged weights would not be finite.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"{name} cannot be merged: {error}") from error
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        # Adapters of several parameters of one module are nested.
        if parent not in layers:
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    merge_token_rows(model)
    del model.peft_config
    return model


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters. Not by peft's ``disable_adapters``, which also freezes them and makes them
    trainable again: an engine that has hooks on their gradients is not asked whether it takes that."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    was = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, was, strict=True):
            layer._disable_adapters = off


def config_of(model: PreTrainedModel) -> LoraConfig:
    """The config of a model's adapters."""
    configs: Any = model.peft_config
    return configs["default"]


def inject(model: PreTrainedModel, config: LoraConfig) -> None:
    """Inject adapters in the model's current mode (training or evaluation) and freeze everything else."""
    from peft import inject_adapter_in_model

    # Without these, peft leaves fully trained modules in place instead of wrapping a copy of each.
    whole, tying = config.modules_to_save, config.ensure_weight_tying
    rows: Any = config.trainable_token_indices
    config.modules_to_save, config.ensure_weight_tying, config.inference_mode = None, False, False
    config.trainable_token_indices = None
    try:
        inject_adapter_in_model(config, model)
    finally:
        config.modules_to_save, config.ensure_weight_tying, config.trainable_token_indices = whole, tying, rows
    if rows:
        add_token_rows(model, rows)
    model.train(model.training)
