"""Completions of prompts, batch by batch, with the time and the cache that they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from sparsetrain.counted import counted
from sparsetrain.errors import ModelError
from sparsetrain.generation.observed import observing
from sparsetrain.generation.texts import end_tokens, left_padded
from sparsetrain.inference.cached import CachedGeneration
from sparsetrain.modeling import SparseCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Completion:
    """The text written after one prompt."""

    completion: str
    """The text."""
    prompt_tokens: int
    new_tokens: int
    """The end of text, where the model wrote it, counts."""
    finish: str
    """``stop`` if the model ended the text, ``length`` if ``max_new_tokens`` did."""


@dataclass
class Usage:
    """Sums over all batches."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """Until the first new token of each batch."""
    decode_seconds: float = 0.0
    """For the others."""
    decoded: int = 0
    """Tokens written in :attr:`decode_seconds`."""
    cache_bytes: int = 0
    """The largest cache of a batch, on its devices."""
    host_bytes: int = 0
    """What that of a batch held in host memory, at most."""
    observations: list[dict[str, float]] = field(default_factory=list)
    """Of each batch and layer that read a choice of keys."""

    def add(self, completions: Sequence[Completion], prefill: float, decode: float) -> None:
        """Count a batch, with the seconds until its first new token and for the others."""
        self.prompt_tokens += sum(each.prompt_tokens for each in completions)
        self.new_tokens += sum(each.new_tokens for each in completions)
        self.decoded += sum(max(each.new_tokens - 1, 0) for each in completions)
        self.prefill_seconds += prefill
        self.decode_seconds += decode

    def add_cache(self, cache: Any) -> None:
        """Count the cache of a batch, and what its layers observed."""
        self.cache_bytes = max(self.cache_bytes, cache_bytes(cache))
        if isinstance(cache, SparseCache):
            self.host_bytes = max(self.host_bytes, cache.host_nbytes())
        memories = (getattr(layer, "memory", None) for layer in cache.layers)
        found = [memory.observations() for memory in memories if memory is not None]
        self.observations += [each for each in found if each]


class _Clock(StoppingCriteria):
    """Notes when the first token came, and stops all rows where that is enough."""

    def __init__(self, on_token: Callable[[], None], enough: Callable[[], bool]) -> None:
        self.first: float | None = None
        self._on_token, self._enough = on_token, enough

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.first is None:
            self.first = now(input_ids.device)
        self._on_token()
        return torch.full((input_ids.shape[0],), self._enough(), dtype=torch.bool, device=input_ids.device)


@dataclass
class Writer:
    """A model that continues prompts.

    Args:
        arguments: of ``model.generate``.
        max_new_tokens: the most that are written after a prompt.
        limits: ``budget`` and ``offload`` of a :class:`~sparsetrain.SparseCache`, whose steps are captured on a GPU;
            None generates without one, in caches that grow.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    arguments: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._cached = CachedGeneration(self.model, self.limits)
        # Memories take the place of any cache, and the kind of cache changes no token.
        config: Any = self.model.generation_config
        config.cache_implementation = None

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        streamer: BaseStreamer | None = None,
        on_token: Callable[[], None] = lambda: None,
        enough: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Continue a batch of prompts.

        Args:
            prompts: token ids of each; they may differ in length.
            streamer: is handed the tokens as they come; for a batch of one.
            on_token: called after each token of the batch.
            enough: asked then; true ends the batch.

        Raises:
            ModelError: the device has too little memory, or the budget is too small.
        """
        device = self.model.device
        ids, mask = left_padded(prompts, self._padding())
        cache = self._cached.cache(len(prompts), ids.shape[1] + self.max_new_tokens)
        clock = _Clock(on_token, enough)
        begin = now(device)
        try:
            with observing():
                written: Any = self._cached.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self._padding(),
                    eos_token_id=sorted(self._ends()) or None,
                    stopping_criteria=StoppingCriteriaList([clock]),
                    streamer=streamer,
                    return_dict_in_generate=True,
                    use_cache=True,
                    past_key_values=cache,
                    **self.arguments,
                )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{device} has too little memory for {counted(len(prompts), 'prompt')} of up to {ids.shape[1]} tokens; "
                "lower --batch, or shorten them"
            ) from error
        end = now(device)
        completions = [
            self._completion(row, len(prompt))
            for row, prompt in zip(written.sequences[:, ids.shape[1] :].tolist(), prompts, strict=True)
        ]
        first = end if clock.first is None else clock.first
        self.usage.add(completions, first - begin, end - first)
        self.usage.add_cache(written.past_key_values)
        return completions

    def _padding(self) -> int:
        padding = self.tokenizer.pad_token_id
        return padding if isinstance(padding, int) else min(self._ends(), default=0)

    def _ends(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    def _completion(self, row: list[int], prompt_tokens: int) -> Completion:
        end = next((place for place, token in enumerate(row) if token in self._ends()), None)
        kept = row if end is None else row[: end + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(str(text), prompt_tokens, len(kept), "length" if end is None else "stop")


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache of transformers holds."""
    total = 0
    for layer in cache.layers:
        memory = getattr(layer, "memory", None)
        if memory is not None:
            total += memory.nbytes()
            continue
        held = (getattr(layer, name, None) for name in ("keys", "values"))
        total += sum(tensor.nbytes for tensor in held if tensor is not None)
    return total


def now(device: torch.device) -> float:
    """Seconds, after all work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
