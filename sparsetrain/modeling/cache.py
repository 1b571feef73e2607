"""Our memories in transformers' caches: a layer of a cache that holds one.

transformers makes a cache without knowing the attention method. So a forward pre-hook of each attention layer replaces
that layer's empty entry in the cache by a :class:`MemoryLayer`. It works alike in ``generate``, in pipelines and in a
forward pass with ``use_cache=True``.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sparsetrain.errors import ModelError
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.pages import check_room
from sparsetrain.methods.memory import Memory
from sparsetrain.modeling.attention.mask import STATIC
from sparsetrain.modeling.attention.plan import LayerPlan

MEMORY_ARGUMENT = "sparsetrain_memory"
"""Name under which a layer's memory travels to the attention function."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""Names of the cache among the arguments of attention layers."""

FOREIGN = "this cache was filled by another attention method; start again with an empty cache"

UNUSED = (
    "use_cache=False, and past_key_values is a cache, into which the whole text would be read in every step: pass "
    "use_cache=True (the config of the model may say otherwise), or leave the cache out"
)

HOOK_ATTRIBUTE = "sparsetrain_memory_hook"
UNUSED_HOOK_ATTRIBUTE = "sparsetrain_unused_cache_hook"


class MemoryLayer(CacheLayerMixin):
    """One layer's memory, where transformers expects keys and values.

    ``update`` stores nothing: a memory needs more than keys and values, so the tokens join it in the attention
    function, which gets the new ones from here.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, memory: Memory, plan: LayerPlan) -> None:
        super().__init__()
        self.memory = memory
        self.plan = plan
        self.counted = 0
        """Tokens that the host has seen read, padding included."""
        self._expected = False

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryLayer:
        """A past of its own for the same model: ``copy.deepcopy(cache)`` lets several texts go on from one prompt."""
        for shared in (self.plan, self.plan.method, self.plan.decode):
            # Unless the model is copied with it.
            memo.setdefault(id(shared), shared)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def expect(self) -> Memory:
        """The memory, for a layer that will call :meth:`update` and then attend with it.

        Raises:
            ModelError: it cannot be used any more.
        """
        if self.memory.fault is not None:
            raise ModelError(self.memory.fault)
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
            raise ModelError(FOREIGN)
        self._expected = False
        self.is_initialized = True
        self.counted += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.counted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks reach over everything read, as with a full cache: they tell where a row's padding ends."""
        return self.counted + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory makes its own room."""

    def reset(self) -> None:
        """Forget everything."""
        if self.memory.fault is not None:
            self.memory.fault = None
        self.memory.reset()
        self.counted = 0
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
            ModelError: there are not so many, or the memory cannot.
        """
        # After every round of guesses it is 0: then nothing waits for the device.
        if tokens_to_remove != 0:
            held = int(self.get_seq_length())
            if not 0 < -tokens_to_remove <= held:
                raise ModelError(
                    f"crop({tokens_to_remove}): give minus the number of tokens to take back, at most the {held} that "
                    "this cache holds"
                )
        self.memory.rollback(-tokens_to_remove)
        self.counted += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Some of the tokens that follow may be taken back."""
        self.memory.begin_round()

    def offload(self) -> None:
        """Move to host memory.

        Raises:
            ModelError: the memory cannot.
        """
        self.memory.offload()

    def _select(self, change: Any) -> None:
        self.memory.select_rows(change(torch.arange(self.memory.rows)))


class StaticMemoryLayer(MemoryLayer):
    """A layer whose room is made once for ``max_length`` tokens a row, so that a step is the same for every length.

    What a step changes is in tensors of fixed address. No Python value that ``torch.compile`` guards on changes.

    Args:
        seen: tokens read so far, padding included, int64 ``[]`` on the layer's device.
        counts: this layer counts them there; others of the same cache share the tensor.
    """

    def __init__(self, memory: Memory, plan: LayerPlan, max_length: int, seen: torch.Tensor, *, counts: bool) -> None:
        super().__init__(memory, plan)
        self.max_length = max_length
        self.told: tuple[Memory, ...] = ()
        """Memories of the cache that have to know of a pass before it."""
        self._asked = 0
        self._seen, self._counts = seen, counts

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """A step can be compiled."""
        return self.memory.static

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`MemoryLayer.update`."""
        if not self._expected:
            raise ModelError(FOREIGN)
        self._expected = False
        if self._counts:
            self._seen.add_(key_states.shape[2])
        if not torch.compiler.is_compiling():
            self.counted += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        """Tokens read so far, padding included: int64 ``[]`` on the layer's device."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``max_length``, and no offset. Called before every pass, compiled or not, so it checks the room and tells
        those memories that have to know.

        Raises:
            ModelError: there is no room for so many tokens more.
        """
        if not torch.compiler.is_compiling():
            self._asked += query_length
            if self._asked > self.max_length:
                # This count is too high after a crop, or if masks were made without a pass: read the true one, which
                # waits for the device.
                self._asked = int(self._seen) + query_length
                check_room(self._asked, self.max_length)
            for memory in self.told:
                memory.prepare(query_length)
        return self.max_length, 0

    def get_max_length(self) -> int:
        """Tokens that there is room for, padding included."""
        return self.max_length

    def reset(self) -> None:
        """Forget everything."""
        if self.memory.fault is not None:
            self.memory.fault = None
        self.memory.reset()
        if self._counts:
            self._seen.zero_()
        self.counted = self._asked = 0

    def host_counts(self) -> tuple[int, int, int]:
        """What the host has counted: a captured step counts only on the device."""
        return self.counted, self._asked, self.memory.longest

    def set_host_counts(self, counts: tuple[int, int, int], more: int = 0) -> None:
        """Take counts of :meth:`host_counts`, and ``more`` tokens."""
        self.counted, self._asked, self.memory.longest = (count + more for count in counts)

    def crop(self, tokens_to_remove: int) -> None:
        """See :meth:`MemoryLayer.crop`."""
        super().crop(tokens_to_remove)
        if self._counts:
            self._seen.add_(tokens_to_remove)


def refuse_unused_cache(model: nn.Module) -> None:
    """Make a model refuse a call with a cache and ``use_cache=False``, as transformers' loops call it for every token
    with the whole text."""
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and each.can_generate() and UNUSED_HOOK_ATTRIBUTE not in each.__dict__:
            setattr(each, UNUSED_HOOK_ATTRIBUTE, each.register_forward_pre_hook(_check_used, with_kwargs=True))


def _check_used(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model that generates."""
    if kwargs.get("use_cache") is False and kwargs.get("past_key_values") is not None:
        raise ModelError(UNUSED)


def keep_memory(layer: nn.Module, plan: LayerPlan) -> None:
    """Make an attention layer keep the past in a memory wherever it is handed a cache."""
    drop_memory(layer)
    if shares_keys(layer) and (plan.method is None or plan.method.memory() is None):
        return
    names = list(inspect.signature(layer.forward).parameters)
    hook = layer.register_forward_pre_hook(partial(_hand_over, plan, names), with_kwargs=True)
    setattr(layer, HOOK_ATTRIBUTE, hook)


def drop_memory(layer: nn.Module) -> None:
    """Undo :func:`keep_memory`."""
    hook = layer.__dict__.pop(HOOK_ATTRIBUTE, None)
    if hook is not None:
        hook.remove()


def shares_keys(layer: Any) -> bool:
    """Other layers may read the keys that this one gets back from the cache (Gemma 3n)."""
    return "reuse" in (getattr(layer.config, "kv_sharing_modes", None) or ())


def _hand_over(
    plan: LayerPlan, names: list[str], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: finds the memory in the cache of the call and sends it along."""
    arguments = dict(zip(names, args, strict=False)) | kwargs
    cache = next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
    if cache is None:
        return None
    held = _memory_layer(cache, layer.layer_idx, plan)
    if held is None:
        return None
    if not torch.compiler.is_compiling():
        rows, tokens = arguments[names[0]].shape[:2]  # of the hidden states
        _check_follows(cache, layer.layer_idx, held, rows, tokens)
    return args, {**kwargs, MEMORY_ARGUMENT: held.expect()}


def _check_follows(cache: Cache, index: int, held: MemoryLayer, rows: int, tokens: int) -> None:
    """Refuse a call that does not go on from what the cache holds: of other rows, or after a pass that was broken off
    and left the layer before further than this one."""
    if held.counted and held.memory.rows not in (0, rows):
        raise ModelError(
            f"the cache holds a batch of {held.memory.rows}, and this call has one of {rows}: start again with an "
            "empty cache, or call cache.batch_repeat_interleave or cache.batch_select_indices first"
        )
    before, read = cache.layers[index - 1] if index else None, held.counted + tokens
    if isinstance(before, MemoryLayer) and before.counted > read:
        raise ModelError(
            f"with this call, layer {index - 1} has read {before.counted} tokens into the cache, and layer {index} "
            f"{read}: a pass was broken off between them; start again with an empty cache"
        )


def _memory_layer(cache: Cache, index: int, plan: LayerPlan) -> MemoryLayer | None:
    """The place of layer ``index`` in a cache, made ours if it was still empty. None where the cache keeps keys and
    values in a way of its own, which the layer then reads: quantised, offloaded, beside the state of other layers."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    held: Any = cache.layers[index]
    if isinstance(held, MemoryLayer) and held.plan is plan:
        return held
    if isinstance(held, StaticMemoryLayer):
        raise ModelError(
            "this SparseCache was made for another model, or before the model's attention method changed; make a new "
            "one"
        )
    if isinstance(held, StaticLayer):
        raise ModelError(STATIC)
    own = plan.method is not None and plan.method.memory() is not None
    if not isinstance(held, MemoryLayer):
        takes_over = type(held) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not own and (cache.offloading or not takes_over):
            return None
        if not takes_over:
            raise ModelError(
                f"{type(held).__name__} in the cache of layer {index} cannot hold what {type(plan.method).__name__} "
                "remembers; generate without cache_implementation"
            )
    if held.get_seq_length() > 0:
        raise ModelError(
            f"the cache of layer {index} holds {held.get_seq_length()} tokens of another attention method; start again "
            "with an empty cache"
        )
    memory = make_memory(plan.method, plan.window, decode=plan.decode, index=plan.index)
    if cache.offloading:
        memory.offload()
    ours = MemoryLayer(memory, plan)
    cache.layers[index] = ours
    return ours
