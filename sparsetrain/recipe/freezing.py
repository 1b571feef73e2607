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
        RecipeError: Names match no parameter; all are listed, each with the nearest component.
    """
    every = list(paths)
    missing = [name for name in names if not any(is_named(path, name) for path in every)]
    if missing:
        raise RecipeError(
            "\n".join(f"train.freeze: {name} names no parameter of {model}{_hint(name, every)}" for name in missing)
        )
    return {path for path in every if any(is_named(path, name) for name in names)}


def _hint(name: str, paths: Sequence[str]) -> str:
    """The nearest component, or what there is behind the part of a name that exists: ``layers.9`` of five layers."""
    known, _, rest = name.rpartition(".")
    behind = {f".{path}.".partition(f".{known}.")[2].partition(".")[0] for path in paths if is_named(path, known)}
    numbers = sorted(int(part) for part in behind if part.isdecimal())
    if rest.isdecimal() and numbers:
        return f"; {known} has {numbers[0]} to {numbers[-1]}"
    components = sorted({part for path in paths for part in path.split(".") if not part.isdecimal()})
    return did_you_mean(name, components, otherwise=f"; its parameters have {', '.join(components[:12])}")
