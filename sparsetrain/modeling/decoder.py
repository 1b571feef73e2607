"""Which modules of a model belong to the text decoder: what is trained, and what every walk over modules means.

A model may hold a vision or audio tower beside its decoder, with linear layers and norms of the same names. Text does
not pass through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparsetrain.modeling.attention import PLAN_ATTRIBUTE


def decoder_holding(model: nn.Module, layers: Iterable[nn.Module]) -> PreTrainedModel | None:
    """The smallest transformers model in ``model`` that holds all of these layers."""
    wanted = set(layers)
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    # Those that hold all of them lie inside each other, the outermost first.
    return holders[-1] if holders else None


def decoder_modules(model: Any) -> dict[str, nn.Module]:
    """Every module of a sparsified model's text decoder and of its output head, by name."""
    decoder = decoder_holding(model, (module for module in model.modules() if hasattr(module, PLAN_ATTRIBUTE)))
    roots = [root for root in (decoder, model.get_output_embeddings()) if root is not None]
    inside = {id(module) for root in roots for module in root.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in inside}
