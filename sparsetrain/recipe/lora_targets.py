"""Select the layers that ``lora.targets`` names, for loaded models and for ``plan``."""

from __future__ import annotations

from collections.abc import Collection

from sparsetrain.errors import RecipeError
from sparsetrain.recipe.expressions import matching


def layers_named(targets: str | list[str], names: Collection[str], model: str) -> set[str]:
    """The ``names`` that an expression fully matches, or that equal or end with a name of a list.

    Args:
        names: Full names of the decoder's linear layers and expert weights.
        model: The name of the model in error messages.

    Raises:
        RecipeError: The expression, or a name of the list, matches none.
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
    """The error for targets that match nothing; it lists the available names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return RecipeError(
        f"lora.targets: {missed} matches no linear layer of {model}, whose decoder's linear layers are named "
        f"{', '.join(leaves)} (the first: {next(iter(names), 'none')})"
    )


def tied_head() -> RecipeError:
    """The error for targets that name an output head tied to the embedding."""
    return RecipeError(
        "lora.targets names the output head, which shares its weight with the embedding (tied): an adapter would "
        "change only one of them; leave it out, and set lora.train_embeddings to train both"
    )
