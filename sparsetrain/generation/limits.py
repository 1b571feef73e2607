"""Limits of a cache's room on the device, and the reason where a layer's attention does not allow one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import FULL, LEARNED, PATTERN, RECYCLED, WINDOW

REASONS = {
    (FULL, "budget"): (
        "every step may read any key, and a budget would evict; train a pattern or sparsek, whose steps read few, or "
        "choose the keys that are read with decode (set_decode), which keeps them all"
    ),
    (FULL, "offload"): (
        "a step reads all keys, or chooses among them while it runs (decode), so that each layer of every step would "
        "wait for its keys; train a block pattern, which is known ahead, or use several devices"
    ),
    (RECYCLED, "budget"): (
        "few keys are read in a step, but every choice is made among all of them, and a budget would evict; leave "
        "budget out, or train sparsek, which keeps few"
    ),
    (RECYCLED, "offload"): (
        "a step that chooses reads all keys, and no step knows ahead which keys it will read, so that each layer would "
        "wait for them; leave offload out and use several devices, or train a block pattern, which is known ahead"
    ),
    (WINDOW, "offload"): "what has left a window is never read again, so that nothing is left to move to the host; "
    "leave offload out",
    (LEARNED, "offload"): "a step reads all of the few keys that the method keeps; leave offload out",
}
"""By the attention of a layer and what is asked for: why not. What is not here is possible."""

KINDS = {"budget": (WINDOW, PATTERN, LEARNED), "offload": (PATTERN,)}
"""The attention for which each is possible."""


@dataclass(frozen=True)
class Limits:
    """What a cache may take. Layers that do not allow a limit keep what they keep without it."""

    budget: int | None = None
    """Tokens of a row and layer that there is room for on the device; None means as many as are needed."""
    offload: bool = False
    """Keep on the device what is read now and next, and the rest in host memory."""

    def of(self, kind: str) -> Limits:
        """The limits that a layer with this kind of attention takes."""
        budget = self.budget if kind in KINDS["budget"] else None
        return Limits(budget, self.offload and kind in KINDS["offload"])

    def check(self, kinds: Iterable[str]) -> None:
        """Refuse a limit that no layer allows.

        Args:
            kinds: :func:`~sparsetrain.generation.composition.attention_kind` of each layer.

        Raises:
            ModelError: says why.
        """
        found = list(dict.fromkeys(kinds))
        for name, given in (("budget", self.budget is not None), ("offload", self.offload)):
            if given and not any(kind in KINDS[name] for kind in found):
                value = self.budget if name == "budget" else self.offload
                raise ModelError(f"{name}={value}: the layers of this model have {found[0]}: {REASONS[found[0], name]}")
