"""The name under which transformers finds our attention, and what stops a model that no longer asks for it.

``set_attn_implementation``, continuous batching and serving engines put another name into the config. The model would
then attend densely, while its config still records the method.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsetrain.errors import ModelError
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE

ATTENTION_NAME = "sparsetrain"
"""The name in transformers' registries. Names with ``flash``, ``sdpa``, ``flex`` or ``/`` would be routed elsewhere."""

HOOK_ATTRIBUTE = "sparsetrain_name_hook"


def guard_name(layer: nn.Module) -> None:
    """Make an attention layer refuse to run once its config asks for another attention than ours."""
    if HOOK_ATTRIBUTE not in layer.__dict__:
        setattr(layer, HOOK_ATTRIBUTE, layer.register_forward_pre_hook(_check_name))


def lift_guard(model: nn.Module) -> None:
    """Let a model run with another attention all the same: what stands beside ours in a benchmark."""
    for module in model.modules():
        hook = module.__dict__.pop(HOOK_ATTRIBUTE, None)
        if hook is not None:
            hook.remove()


def check_attends(model: nn.Module) -> None:
    """Refuse a model whose layers no longer run the method that is recorded for them.

    Raises:
        ModelError: says what they run, and how to go back.
    """
    for module in model.modules():
        if hasattr(module, PLAN_ATTRIBUTE):
            _check_name(module)


def _check_name(layer: Any, *_: Any) -> None:
    """Forward pre-hook of attention layers."""
    name = layer.config._attn_implementation
    if name != ATTENTION_NAME:
        raise ModelError(
            f"the config of {type(layer).__name__} asks for attn_implementation={name!r}, which is dense, and the "
            f"model's record names a sparse method: call model.set_attn_implementation({ATTENTION_NAME!r}) to run that "
            "method, or load the folder with plain transformers (from_pretrained) to run the dense model"
        )
