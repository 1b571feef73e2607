"""Our memories in transformers' caches: layers of a cache that hold one in the place of keys and values."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from sparsetrain.errors import ModelError
from sparsetrain.generation.pages import check_room
from sparsetrain.methods.memory import Memory
from sparsetrain.modeling.attention.plan import LayerPlan

FOREIGN = "this cache was filled by another attention method; start again with an empty cache"


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


def shares_keys(layer: Any) -> bool:
    """Other layers may read the keys that this one gets back from the cache (Gemma 3n)."""
    return "reuse" in (getattr(layer.config, "kv_sharing_modes", None) or ())
