"""Replace the regular expressions in an adapter's config by the module names that they match.

peft matches them with ``re`` against every module, which never ends for an expression with catastrophic backtracking.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError
from sparsetrain.recipe.expressions import matching

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
"""A keyword of peft, not an expression."""


def bound_expressions(config: LoraConfig, names: Collection[str], path: Path) -> None:
    """Replace the regular expressions in an untrusted adapter config by names, in place.

    Args:
        names: The names of all modules of the model.
        path: The adapter folder, for error messages.

    Raises:
        ModelError: An expression is invalid or takes too long; names the field.
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
                raise ValueError(f"{pattern!r:.100} is not the name of a list of layers, such as layers")
    except ValueError as error:
        raise ModelError(f"the adapters in {path}: {field} of adapter_config.json: {error}") from None


def _by_name(patterns: Any, names: Collection[str]) -> Any:
    """Ranks or alphas by full module name. If several patterns match a name, the first counts, as in peft."""
    if not isinstance(patterns, dict) or all(str(key).replace("_", "").replace(".", "").isalnum() for key in patterns):
        return patterns
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        for name in matching(rf"(.*\.)?({pattern})", names):
            found.setdefault(name, value)
    return found
