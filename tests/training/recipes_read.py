"""Imported where ranks are forked: the shipped recipes, which the page of every run compares with its own, are read."""

from __future__ import annotations

from sparsetrain.recipe.differences import _loaded
from sparsetrain.recipe.shipped import shipped_recipes

for _file in shipped_recipes().values():
    _loaded(_file)
