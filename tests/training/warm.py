"""Imported last where ranks are forked: does what each would do anew before its first step.

The shipped recipes are read, which the page of every run compares with its own, tasks are imported, DeepSpeed asks
which of its operations it could build, and transformers makes its table of renamed weights. What is there by then is no
garbage: DeepSpeed looks for some in every rank, which would copy all of it.
"""

from __future__ import annotations

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from sparsetrain.evaluation.registry import TASKS
from sparsetrain.recipe.differences import _loaded
from sparsetrain.recipe.shipped import shipped_recipes
from sparsetrain.training.distributed.engine import _import_deepspeed

TASKS.usable()
for _file in shipped_recipes().values():
    _loaded(_file)
_import_deepspeed()
get_checkpoint_conversion_mapping("llama")
gc.freeze()
