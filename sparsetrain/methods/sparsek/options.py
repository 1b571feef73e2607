"""Check for attention options that SparseK does not support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.errors import ModelError


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a call that SparseK would ignore.

    Raises:
        ModelError: There is such an option; names it.
    """
    for name in ("softcap", "sink_logits"):
        if options.get(name) is not None:
            raise ModelError(f"SparseK attention does not support {name}, which this model uses")
