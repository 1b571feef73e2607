"""The regular expressions in an adapter's config, replaced by the names that they match: peft would compare them with
every module by ``re``, which an expression made for it keeps busy for ever."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError
from sparsetrain.recipe.expressions import matching

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
"""peft's word, no expression."""


def bound_expressions(config: LoraConfig, names: Collection[str], path: Path) -> None:
    """Replace the expressions of a config that somebody else wrote, in place.

    Args:
        names: of all the modules of the model.
        path: the adapter folder, for errors.

    Raises:
        ModelError: one is no expression, or takes for ever; names the field.
    """
    field = "target_modules"
    try:
        for field in ("target_modules", "exclude_modules"):
            expression = getattr(config, field)
            if isinstance(expression, str) and expression.lower() != ALL_LINEAR:
                setattr(config, field, matching(expression, names))
        for field in ("rank_pattern", "alpha_pattern"):
            setattr(config, field, _by_name(getattr(config, field), names))
        field = "layers_pattern"
        given = getattr(config, field)
        for pattern in [given] if isinstance(given, str) else given or []:
            if not str(pattern).replace("_", "").isalnum():
                raise ValueError(f"{pattern!r:.100} is no name of a list of layers, such as layers")
    except ValueError as error:
        raise ModelError(f"the adapters in {path}: {field} of adapter_config.json: {error}") from None


def _by_name(patterns: Any, names: Collection[str]) -> Any:
    """Ranks or alphas by whole name; of several patterns that match a name the first counts, as to peft."""
    if not isinstance(patterns, dict) or all(str(key).replace("_", "").replace(".", "").isalnum() for key in patterns):
        return patterns
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        for name in matching(rf"(.*\.)?({pattern})", names):
            found.setdefault(name, value)
    return found
