"""RULER (2404.06654): 13 tasks of retrieval, tracing, aggregation and questions, at several lengths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.evaluation.base import Task
from sparsetrain.evaluation.ruler.result import RulerResult
from sparsetrain.evaluation.ruler.settings import RulerSettings
from sparsetrain.evaluation.ruler.specs import BUDGETS, answers_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.ruler.prompts import Prompt
    from sparsetrain.world import World

TOKENS = 16384
"""Shorter prompts share a batch of up to so many tokens."""

_MADE: dict[str, tuple[Any, list[Prompt]]] = {}
"""The prompts of the last evaluation, by the name of the task, and what they depend on."""


class RulerSection(RulerSettings):
    """The 13 tasks of RULER: what a model writes greedily behind a prompt is searched for the answers."""

    result = RulerResult

    task: Literal["ruler"] = "ruler"
    """RULER."""

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest prompt of each task, and the files."""
        from sparsetrain.evaluation.ruler.prompts import Prompts

        Prompts(self, tokenizer, seed=0).smallest()

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Ruler:
        """All prompts."""
        return Ruler(self, tokenizer, seed)


class Ruler(Task):
    """RULER's prompts: the same for every model and every evaluation with one seed.

    Raises:
        DataError: a length has no room for a task, or a file cannot be read.
    """

    def __init__(self, section: RulerSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.section, self._tokenizer = section, tokenizer
        self.lengths = sorted(set(section.lengths))
        grouped: dict[tuple[int, int], list[Prompt]] = defaultdict(list)
        for prompt in _prompts(section, tokenizer, seed):
            grouped[BUDGETS[prompt.task], prompt.length].append(prompt)
        # Prompts that are answered together, by the tokens to write: ranks write equally many at a time.
        self.parts: dict[int, list[list[Prompt]]] = defaultdict(list)
        for (budget, length), prompts in grouped.items():
            fit = max(self.lengths[-1], TOKENS) // length
            self.parts[budget] += [prompts[at : at + fit] for at in range(0, len(prompts), fit)]

    def num_forwards(self, ranks: int) -> int:
        """Several prompts at a time; a text that is written counts as one pass."""
        return sum(math.ceil(len(parts) / ranks) for parts in self.parts.values())

    def measure(self, model: PreTrainedModel, world: World, on_forward: Callable[[], None]) -> RulerResult:
        """Answers found by task and length."""
        import torch

        from sparsetrain.evaluation.scoring import deal, sum_over_ranks
        from sparsetrain.evaluation.writing import write

        tasks = self.section.measured
        # Answers found and tokens written.
        sums = torch.zeros(2, len(tasks), len(self.lengths), dtype=torch.int64)
        for budget, parts in self.parts.items():
            for part, weight in deal(parts, world):
                read = [prompt.input_ids for prompt in part]
                texts = write(model, self._tokenizer, read, budget, in_step=world.size > 1)
                for prompt, tokens in zip(part, texts, strict=True):
                    text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
                    found = answers_found(prompt.task, text, prompt.references)
                    place = tasks.index(prompt.task), self.lengths.index(prompt.length)
                    sums[:, *place] += weight * torch.tensor([found, len(tokens)])
                on_forward()
        found, written = sum_over_ranks(sums, world).tolist()
        return RulerResult(
            lengths=self.lengths,
            samples=self.section.samples,
            found=dict(zip(tasks, found, strict=True)),
            written=dict(zip(tasks, written, strict=True)),
            left_out=self.section.left_out,
            prompt="chat" if self.section.uses_chat(self._tokenizer) else "plain",
            mirror=self.section.mirror,
            haystack=self.section.haystack or "generated",
            words=self.section.words or "generated",
        )


def _prompts(section: RulerSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
    """All prompts. They are kept for the next evaluation of the run: making long ones takes minutes."""
    from sparsetrain.data.encoding import tokenizer_fingerprint
    from sparsetrain.evaluation.ruler.prompts import Prompts

    changed = [file.stat().st_mtime_ns for file in section.files() if file.exists()]
    key = (section, tokenizer_fingerprint(tokenizer), seed, changed)
    known, made = _MADE.get(section.label, (None, []))
    if known != key:
        made = Prompts(section, tokenizer, seed).all()
        _MADE[section.label] = key, made
    return made
