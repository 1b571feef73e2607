"""What recycled attention asks of a layer and of a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sparsetrain.errors import ModelError


def check_layer(layer: Any, layer_index: int) -> None:
    """Refuse a layer whose attention has a part that is not supported, or that keeps the documents from it.

    Raises:
        ModelError: It has; names the part.
    """
    name, parameters = type(layer).__name__, inspect.signature(layer.forward).parameters
    for attribute, meaning in (("attn_logit_softcapping", "soft-capped logits"), ("sinks", "learned sink logits")):
        if getattr(layer, attribute, None) is not None:
            raise ModelError(f"layer {layer_index} ({name}) has {meaning}, which recycled attention does not support")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ModelError(
            f"layer {layer_index} ({name}) does not pass additional keyword arguments to its attention, by which "
            "recycled attention learns where prompts end"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a call that would be ignored.

    Raises:
        ModelError: There is such an option; names it.
    """
    for name in ("softcap", "sink_logits"):
        if options.get(name) is not None:
            raise ModelError(f"recycled attention does not support {name}, which this model uses")
