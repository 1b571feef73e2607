"""Texts that a model writes behind prompts, the same on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsetrain.counted import counted
from sparsetrain.errors import ModelError
from sparsetrain.generation.texts import end_tokens, left_padded, without_own_settings
from sparsetrain.inference.cached import AUTO, CachedGeneration, free, make_cache

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """What was written behind a prompt."""

    tokens: list[int]
    """Without the one that ended it."""
    cut: bool
    """The model did not end it within its budget."""


class TextWriter:
    """Continues prompts greedily, under the attention method and the decode section that the model records, and without
    the penalties of its generation config. Steps are captured as those of ``sparsetrain generate`` are.

    Args:
        model: gone through :func:`sparsetrain.sparsify`, in evaluation mode.
        in_step: make as many forward passes as the budget allows, whatever is written: ranks that share a model by
            ZeRO-3 must make equally many.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, in_step: bool) -> None:
        self.model, self._in_step = model, in_step
        self.ends = end_tokens(model, tokenizer)
        """Tokens that end a text."""
        self.no_cache: str | None = None
        """Why the model has no cache of known length; None where it has one."""
        try:
            make_cache(model, 1, AUTO)
        except ModelError as error:
            self.no_cache = str(error)
        self._cached = CachedGeneration(model, None if self.no_cache else AUTO)

    def write(self, prompts: Sequence[np.ndarray], new_tokens: int, room: int = 0) -> list[Text]:
        """Continue a batch of prompts.

        Args:
            prompts: token ids of each, ``[n]``; they may differ in length.
            new_tokens: the most that are written.
            room: tokens that a prompt and its answer have at most; batches of equal room share a captured step.
        """
        with self._alone():
            cache = self._cached.cache(len(prompts), max(room, max(map(len, prompts)) + new_tokens))
            return self._write(prompts, new_tokens, cache, self.ends)

    def write_each(self, prompts: Sequence[np.ndarray], new_tokens: int, room: int = 0) -> list[Text]:
        """Continue prompts that begin alike: that part is read once, and each goes on from a copy of the cache.

        Args:
            prompts, new_tokens, room: as for :meth:`write`.
        """
        if len(prompts) == 1 or self.no_cache is not None:
            return [text for prompt in prompts for text in self.write([prompt], new_tokens, room)]
        shared = _shared(prompts)
        with self._alone():
            cache: Any = self._cached.cache(1, max(room, max(map(len, prompts)) + new_tokens))
            # The token that this writes is not read, so that the cache holds what is shared.
            self._generate([prompts[0][:shared]], 1, cache, set())
            texts: list[Text] = []
            for prompt in prompts:
                own = copy.deepcopy(cache)
                texts += self._write([prompt], new_tokens, own, self.ends)
                free(own)
            return texts

    def release(self) -> None:
        """Give the memory of the last cache back."""
        self._cached.release()

    def conversation(self, room: int) -> Conversation:
        """A conversation of at most ``room`` tokens.

        Raises:
            ModelError: the model has no cache that can go on.
        """
        if self.no_cache is not None:
            raise ModelError(self.no_cache)
        with self._alone():
            return Conversation(self, self._cached.cache(1, room))

    def _write(self, prompts: Sequence[Any], new_tokens: int, cache: Any, ends: Collection[int]) -> list[Text]:
        written = self._generate(prompts, new_tokens, cache, ends)
        if self._in_step:
            self._idle(new_tokens - len(written[0]))
        return [_until_end(text, ends) for text in written]

    def _generate(self, prompts: Sequence[Any], new_tokens: int, cache: Any, ends: Collection[int]) -> list[list[int]]:
        """The tokens of each row, padded to the longest."""
        ids, mask = left_padded(prompts)
        try:
            written: Any = self._cached.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=min(ends, default=0),
                use_cache=True,
                past_key_values=cache,
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.model.device} has too little memory for the keys of {counted(len(ids), 'prompt')} of up to "
                f"{ids.shape[1]:,} tokens; ask for shorter lengths"
            ) from error
        rows: list[list[int]] = written[:, ids.shape[1] :].tolist()
        return rows

    def _idle(self, passes: int) -> None:
        """Make the forward passes of a longer text."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        for _ in range(passes):
            self.model(token, use_cache=False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with torch.no_grad(), without_own_settings(self.model):
            yield


class Conversation:
    """Prompts that are answered in turn from one cache, which holds all that was read and written before."""

    def __init__(self, writer: TextWriter, cache: Any) -> None:
        self._writer, self._cache = writer, cache
        self.tokens: list[int] = []
        """What was read and written so far."""

    def ask(self, prompt: Sequence[int], new_tokens: int, ends: Collection[int] = ()) -> Text:
        """Read more tokens, and write an answer.

        Args:
            prompt: the tokens that follow.
            new_tokens: the most that are written.
            ends: tokens that end this answer, beside those that end a text.
        """
        self.tokens += list(prompt)
        with self._writer._alone():
            (text,) = self._writer._write([self.tokens], new_tokens, self._cache, {*self._writer.ends, *ends})
        self.tokens += text.tokens
        return text


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """Tokens with which all begin, so that at least one of each is behind them."""
    most = min(map(len, prompts)) - 1
    first = prompts[0]
    return next((place for place in range(most) if any(each[place] != first[place] for each in prompts)), most)


def _until_end(text: list[int], ends: Collection[int]) -> Text:
    end = next((place for place, token in enumerate(text) if token in ends), None)
    return Text(text[:end], end is None)
