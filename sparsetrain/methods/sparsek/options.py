"""What a model may ask of its attention and SparseK does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.errors import ModelError


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a call that would be left out.

    Raises:
        ModelError: names the option.
    """
    for name in ("softcap", "sink_logits"):
        if options.get(name) is not None:
            raise ModelError(f"SparseK attention has no {name}, which this model asks for; not supported")
