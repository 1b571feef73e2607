"""Which parameters ``train.freeze`` names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsetrain.errors import RecipeError
from sparsetrain.nearest import did_you_mean


def is_named(path: str, name: str) -> bool:
    """Whether a parameter is or lies in what ``name`` names: whole components of its path in a row.

    ``mlp`` and ``layers.0`` name ``model.layers.0.mlp.up_proj.weight``, and ``layers`` does too; ``layer`` does not.
    """
    return f".{name}." in f".{path}."


def frozen(paths: Iterable[str], names: Sequence[str], model: str) -> set[str]:
    """Those of the parameters that are frozen.

    Args:
        model: What the model is called in errors.

    Raises:
        RecipeError: A name matches no parameter; gives the nearest component.
    """
    every = list(paths)
    for name in names:
        if not any(is_named(path, name) for path in every):
            components = sorted({part for path in every for part in path.split(".") if not part.isdecimal()})
            hint = did_you_mean(name, components, otherwise=f"; its parameters have {', '.join(components[:12])}")
            raise RecipeError(f"train.freeze: {name} names no parameter of {model}{hint}")
    return {path for path in every if any(is_named(path, name) for name in names)}
