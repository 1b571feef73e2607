"""Generation in a cache of known length, batch after batch: captured steps where the model and the cache allow them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sparsetrain.inference.loop import replay, why_not
from sparsetrain.modeling import SparseCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = {"budget": "auto", "offload": False}
"""Limits of a cache that has room for all that is read again, on the device."""

logger = logging.getLogger(__name__)


class CachedGeneration:
    """``model.generate`` for one batch after another, as fast as the model allows.

    Args:
        limits: ``budget`` and ``offload`` of the caches; None generates without one, in caches that grow.
    """

    def __init__(self, model: PreTrainedModel, limits: dict[str, Any] | None) -> None:
        self.model, self.limits = model, limits
        self._held: SparseCache | None = None
        self._rows = self._tokens = 0
        self._told = False

    def cache(self, rows: int, tokens: int) -> SparseCache | None:
        """An empty cache for so many rows of up to so many tokens, which may be that of the batch before; None where
        there are no limits."""
        if self.limits is None:
            return None
        held = self._held
        # A step is captured for one cache: it serves again where it fits and has not much more room than is needed.
        spare = tokens // 8 if self.limits["budget"] == "auto" else 0
        if held is not None and self._rows == rows and tokens <= self._tokens <= tokens + spare:
            held.reset()
            return held
        held = None
        self.release()
        self._held, self._rows, self._tokens = make_cache(self.model, tokens, self.limits), rows, tokens
        return self._held

    def release(self) -> None:
        """Give the memory of the cache that was kept back at once."""
        if self._held is not None:
            free(self._held)
        self._held = None

    def generate(self, **arguments: Any) -> Any:
        """Generate, with captured steps where that is possible and transformers' own loop elsewhere. Nothing is
        compiled: that takes minutes for a large model, and eager steps write many tokens in them."""
        reason = why_not(self.model, arguments)
        if reason is None:
            return replay(self.model, **arguments)
        if self.model.device.type == "cuda" and not self._told:
            self._told = True
            logger.warning("steps run one by one, in transformers' own loop: %s", reason)
        return self.model.generate(**arguments, disable_compile=True)  # type: ignore[operator]


def free(cache: SparseCache) -> None:
    """Take the captured step off a cache that is not used any more. They hold each other, and so the device's memory,
    until Python looks for such circles."""
    cache.captured = None


def make_cache(model: PreTrainedModel, tokens: int, limits: dict[str, Any]) -> SparseCache:
    """An empty cache for rows of up to ``tokens`` tokens, and what the model's generation config guesses on top.

    Args:
        limits: ``budget`` and ``offload``.

    Raises:
        ModelError: no layer of the model allows them.
    """
    own: Any = model.generation_config
    guesses = getattr(own, "prompt_lookup_num_tokens", None) or 0
    if getattr(own, "assistant_early_exit", None) is not None:
        guesses = max(guesses, own.num_assistant_tokens or 20)  # transformers' default
    room = tokens + (guesses + 1 if guesses else 0)
    return SparseCache(model, max_length=room, rollback=guesses, **limits)
