"""A task whose prompts a model continues: batches by length and budget, and what is counted of the texts."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsetrain.evaluation.base import TaskResult
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.generative.tally import Tally

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.generative.writing import TextWriter
    from sparsetrain.world import World

TOKENS = 16384
"""Shorter prompts share a batch of up to so many tokens."""


@dataclass(frozen=True)
class Prompt:
    """A question at the end of a text, and its answers."""

    key: str
    """What it is counted under, beside its length."""
    length: int
    """Tokens of prompt and answer together, as asked for."""
    budget: int
    """Tokens written at most."""
    input_ids: np.ndarray
    """int32 ``[n]``: what the model goes on from."""
    references: list[str]
    """The answers."""
    context: int | None = None
    """The number of the context, where several questions are asked of it: it is read once for all."""


Cell = tuple[str, int]
"""A key and a length."""


class GenerativeTask(BatchedTask):
    """Prompts that a model continues greedily, and the answers found in the texts.

    Args:
        prompts: all of them, those of one context behind one another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        self._tokenizer = tokenizer
        self._writer: TextWriter | None = None
        self._batches = _grouped(prompts)

    @abstractmethod
    def right(self, prompt: Prompt, text: str) -> int:
        """Right answers of a text."""

    def answers(self, prompt: Prompt) -> int:
        """Right answers of a text that has all of them."""
        return 1

    @abstractmethod
    def summary(self, tallies: Mapping[Cell, Tally]) -> TaskResult:
        """The result, from what was counted of each cell."""

    def batches(self) -> Mapping[str, Sequence[list[Prompt]]]:
        """Prompts that are answered together, by the tokens to write."""
        return self._batches

    def measure_batch(self, model: PreTrainedModel, batch: list[Prompt], world: World) -> list[list[int]]:
        """Of each prompt right answers, tokens written, and whether the budget ended the text."""
        writer, first = self._writing(model, world), batch[0]
        write = writer.write if first.context is None else writer.write_each
        texts = write([prompt.input_ids for prompt in batch], first.budget, first.length)
        return [
            [self.right(prompt, self._decoded(text.tokens)), len(text.tokens), int(text.cut)]
            for prompt, text in zip(batch, texts, strict=True)
        ]

    def result(self, records: Mapping[str, Sequence[Any]]) -> TaskResult:
        """The sums by cell."""
        if self._writer is not None:
            self._writer.release()
        self._writer = None
        tallies: dict[Cell, Tally] = defaultdict(Tally)
        for group, batches in self._batches.items():
            for batch, counts in zip(batches, records[group], strict=True):
                for prompt, (right, written, cut) in zip(batch, counts, strict=True):
                    tallies[prompt.key, prompt.length] += Tally.of(right, written, cut, self.answers(prompt))
        return self.summary(tallies)

    def _writing(self, model: PreTrainedModel, world: World) -> TextWriter:
        from sparsetrain.evaluation.generative.writing import TextWriter
        from sparsetrain.modeling.sharding import is_sharded

        if self._writer is None or self._writer.model is not model:
            in_step = world.size > 1 and is_sharded(model)
            self._writer = TextWriter(model, self._tokenizer, in_step=in_step)
        return self._writer

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _grouped(prompts: Sequence[Prompt]) -> dict[str, list[list[Prompt]]]:
    """Batches by what decides how many passes each takes."""
    longest = max((prompt.length for prompt in prompts), default=0)
    alike: dict[tuple[int, int, tuple[str, int] | None], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        context = None if prompt.context is None else (prompt.key, prompt.context)
        alike[prompt.budget, prompt.length, context].append(prompt)
    batches: dict[str, list[list[Prompt]]] = defaultdict(list)
    for (budget, length, context), group in alike.items():
        if context is None:
            batches[f"{budget} tokens"] += _cut(group, max(longest, TOKENS) // length)
        else:
            batches[f"{len(group)} times {budget} tokens"].append(group)
    return batches


def _cut(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    yield from (prompts[at : at + size] for at in range(0, len(prompts), size))
