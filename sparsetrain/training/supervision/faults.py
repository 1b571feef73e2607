"""Turn errors during a run into one message on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.supervision.out_of_memory import explain_out_of_memory, is_out_of_memory
from sparsetrain.training.supervision.watch import Watch
from sparsetrain.world import World


@contextmanager
def explained(recipe: Recipe, world: World, watch: Watch) -> Iterator[None]:
    """Report an error to the other ranks at once, and explain known causes.

    Raises:
        TrainingError: Memory ran out, or the error was caused by another rank, which is named.
    """
    try:
        yield
    except BaseException as error:
        if not is_out_of_memory(error):
            watch.attribute(error)
            raise
        known = explain_out_of_memory(error, recipe, world)
        watch.attribute(known)
        raise known from error
