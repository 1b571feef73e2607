"""Finetune Hugging Face language models with sparse attention for long contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsetrain.version import __version__

if TYPE_CHECKING:
    from sparsetrain.inference.loop import generate
    from sparsetrain.modeling import SparseCache, load, save, set_decode, sparsify

__all__ = ["SparseCache", "__version__", "generate", "load", "save", "set_decode", "sparsify"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a model is touched."""
    if name in __all__:
        if name == "generate":
            from sparsetrain.inference.loop import generate

            return generate
        from sparsetrain import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
