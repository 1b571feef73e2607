"""Training data: sources, tokenisation, synthetic tasks, packing, and an exactly resumable stream of rows.

The names here are imported lazily, so that a recipe's data can be checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetrain.data.batch import Batch, Row, Step, collate
    from sparsetrain.data.build import build_rows
    from sparsetrain.data.loader import StepLoader
    from sparsetrain.data.stream import RowStream
    from sparsetrain.data.synthetic import RetrievalPrompt, multikey_prompt, passkey_prompt
    from sparsetrain.data.tokens import held_out_tokens

__all__ = [
    "Batch",
    "RetrievalPrompt",
    "Row",
    "RowStream",
    "Step",
    "StepLoader",
    "build_rows",
    "collate",
    "held_out_tokens",
    "multikey_prompt",
    "passkey_prompt",
]

_MODULES = {
    "batch": ("Batch", "Row", "Step", "collate"),
    "build": ("build_rows",),
    "loader": ("StepLoader",),
    "stream": ("RowStream",),
    "synthetic": ("RetrievalPrompt", "multikey_prompt", "passkey_prompt"),
    "tokens": ("held_out_tokens",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
