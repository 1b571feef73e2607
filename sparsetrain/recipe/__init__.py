"""The recipe: its schema, loading with bases and overrides, and the batch arithmetic."""

from __future__ import annotations

from sparsetrain.recipe.batch import BatchPlan, BatchShape, batch_shape, plan_batch
from sparsetrain.recipe.loading import LoadedRecipe, dump_recipe, load_recipe
from sparsetrain.recipe.schema import SCHEMA_VERSION, Recipe
from sparsetrain.recipe.shipped import shipped_recipes

__all__ = [
    "SCHEMA_VERSION",
    "BatchPlan",
    "BatchShape",
    "LoadedRecipe",
    "Recipe",
    "batch_shape",
    "dump_recipe",
    "load_recipe",
    "plan_batch",
    "shipped_recipes",
]
