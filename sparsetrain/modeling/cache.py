"""A method's own memory in transformers' caches: a layer of a cache that holds it instead of all keys.

A model makes its cache before it runs, and knows nothing of methods. So an attention layer whose method has a memory
looks at the cache it is handed: where its own place is still empty, it puts a :class:`MemoryLayer` there. ``generate``,
pipelines and plain forward passes with ``use_cache=True`` get it without being told.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Method
from sparsetrain.methods.memory import Memory

MEMORY_ARGUMENT = "sparsetrain_memory"
"""Name under which a layer's memory travels to the attention function."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""What attention layers call the cache they are handed."""

HOOK_ATTRIBUTE = "sparsetrain_memory_hook"


class MemoryLayer(CacheLayerMixin):
    """One layer's memory, where transformers expects keys and values.

    ``update`` stores nothing: a memory needs more than keys and values, so the tokens join it in the attention
    function, which gets the new ones from here.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self._tokens = 0
        self._expected = False

    def expect(self) -> Memory:
        """The memory, for a layer that will call :meth:`update` and then attend with it."""
        self._expected = True
        return self.memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are.

        Raises:
            ModelError: the layer that calls does not attend with this memory.
        """
        if not self._expected:
            raise ModelError("this cache was filled by another attention method; start again with an empty cache")
        self._expected = False
        self.is_initialized = True
        self._tokens += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks reach over everything read, as with a full cache: they tell where a row's padding ends."""
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory makes its own room."""

    def reset(self) -> None:
        """Forget everything."""
        self.memory.reset()
        self._tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams that beam search has kept."""
        self.memory.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._select(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._select(lambda rows: rows[indices.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: ``tokens_to_remove`` is minus their number.

        Raises:
            ModelError: the memory cannot.
        """
        self.memory.rollback(-tokens_to_remove)
        self._tokens += tokens_to_remove

    def offload(self) -> None:
        """Move to host memory.

        Raises:
            ModelError: the memory cannot.
        """
        self.memory.offload()

    def _select(self, change: Any) -> None:
        self.memory.select_rows(change(torch.arange(self.memory.rows)))


def keep_memory(layer: nn.Module, method: Method) -> None:
    """Make an attention layer use its method's memory wherever it is handed a cache, if the method has one."""
    drop_memory(layer)
    if method.memory() is not None:
        names = list(inspect.signature(layer.forward).parameters)
        hook = layer.register_forward_pre_hook(partial(_hand_over, method, names), with_kwargs=True)
        setattr(layer, HOOK_ATTRIBUTE, hook)


def drop_memory(layer: nn.Module) -> None:
    """Undo :func:`keep_memory`."""
    hook = layer.__dict__.pop(HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.remove()


def _hand_over(
    method: Method, names: list[str], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: finds the memory in the cache of the call and sends it along."""
    arguments = dict(zip(names, args, strict=False)) | kwargs
    cache = next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
    if cache is None:
        return None
    return args, {**kwargs, MEMORY_ARGUMENT: _memory_layer(cache, layer.layer_idx, method).expect()}


def _memory_layer(cache: Cache, index: int, method: Method) -> MemoryLayer:
    """The place of layer ``index`` in a cache, made ours if it was still empty."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    held: Any = cache.layers[index]
    if isinstance(held, MemoryLayer):
        return held
    memory = method.memory()
    assert memory is not None, "only layers whose method has a memory have this hook"
    if cache.offloading:
        memory.offload()
    if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ModelError(
            f"{type(held).__name__} in the cache of layer {index} cannot hold what {type(method).__name__} remembers; "
            "generate without cache_implementation"
        )
    if held.get_seq_length() > 0:
        raise ModelError(
            f"the cache of layer {index} holds {held.get_seq_length()} tokens of another attention method; start again "
            "with an empty cache"
        )
    ours = MemoryLayer(memory)
    cache.layers[index] = ours
    return ours
