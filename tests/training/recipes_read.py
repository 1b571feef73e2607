"""Imported last where ranks are forked.

The shipped recipes are read, which the page of every run compares with its own. What is there by then is no garbage:
DeepSpeed looks for some in every rank, which would copy all of that.
"""

from __future__ import annotations

import gc

from sparsetrain.recipe.differences import _loaded
from sparsetrain.recipe.shipped import shipped_recipes

for _file in shipped_recipes().values():
    _loaded(_file)
gc.freeze()
