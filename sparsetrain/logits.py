"""Whether a model changes its logits after the output projection, according to its config, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier_scale",
)
"""Config fields that scale or cap logits, unless they are 1."""


def changes_logits(field: Callable[[str], Any]) -> bool:
    """Whether a config says so; ``field`` returns its fields by name, None for those it has not."""
    return any(field(name) not in (None, 1, 1.0) for name in LOGIT_TRANSFORMS)
