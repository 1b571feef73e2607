"""Find the modules of a model's text decoder, which is the part that is trained.

A model may have a vision or audio tower beside its decoder, with linear layers and norms of the same names. Text does
not pass through it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE


def decoder_holding(model: nn.Module, layers: Iterable[nn.Module]) -> PreTrainedModel | None:
    """The smallest transformers model within ``model`` that contains all of these layers."""
    wanted = set(layers)
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    # Models that contain all layers are nested; the outermost comes first.
    return holders[-1] if holders else None


def decoder_modules(model: Any) -> dict[str, nn.Module]:
    """Every module of a sparsified model's text decoder, its embedding and its output head, by name."""
    decoder = decoder_holding(model, (module for module in model.modules() if hasattr(module, PLAN_ATTRIBUTE)))
    roots = [
        root for root in (decoder, model.get_input_embeddings(), model.get_output_embeddings()) if root is not None
    ]
    inside = {id(module) for root in roots for module in root.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def freeze_towers(model: PreTrainedModel) -> list[str]:
    """Freeze the vision and audio towers of a model, which get no gradient from text.

    Returns:
        The names of the frozen modules.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    inside = {id(p) for module in decoder_modules(model).values() for p in module.parameters(recurse=False)}
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
    for parameter in others.values():
        parameter.requires_grad_(False)
    return sorted({name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] for name in others})
