"""The layers that ``lora.targets`` names, of a model that is loaded and of one that is only planned."""

from __future__ import annotations

from collections.abc import Collection

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.expressions import matching


def layers_named(targets: str | list[str], names: Collection[str], model: str) -> set[str]:
    """Those of ``names`` that an expression matches as a whole, or that are or end with a name of a list.

    Args:
        names: whole names of the decoder's linear layers, and of its experts' weights.
        model: what to call it in an error.

    Raises:
        RecipeError: the expression, or one of the list, matches none.
    """
    if isinstance(targets, str):
        matches = {targets: _named(targets, names)}
    else:
        matches = {given: {name for name in names if f".{name}".endswith(f".{given}")} for given in targets}
    if missed := [given for given, found in matches.items() if not found]:
        raise no_layer(", ".join(missed), names, model)
    return set().union(*matches.values())


def _named(targets: str, names: Collection[str]) -> set[str]:
    try:
        return matching(targets, names)
    except ValueError as error:
        raise RecipeError(f"lora.targets: {error}") from None


def no_layer(missed: str, names: Collection[str], model: str) -> RecipeError:
    """The error of targets that match nothing; it says what there is."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return RecipeError(
        f"lora.targets: {missed} matches no linear layer of {model}, whose decoder's linear layers are named "
        f"{', '.join(leaves)} (the first: {next(iter(names), 'none')})"
    )


def tied_head() -> RecipeError:
    """The error of targets that name an output head which is the embedding."""
    return RecipeError(
        "lora.targets names the output head, whose weight is the embedding's too (tied): an adapter would change "
        "only one of them; leave it out, and set lora.train_embeddings to train both"
    )
