"""RULER (2404.06654): 13 tasks of retrieval, tracing, aggregation and questions, at several lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.evaluation.batched import BatchedTask
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


class Ruler(BatchedTask):
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

    def batches(self) -> dict[str, list[list[Prompt]]]:
        """Several prompts at a time; a text that is written counts as one pass."""
        return {str(budget): parts for budget, parts in self.parts.items()}

    def measure_batch(self, model: PreTrainedModel, batch: list[Prompt], world: World) -> list[list[int]]:
        """Answers found and tokens written, of each prompt."""
        from sparsetrain.evaluation.writing import write

        read = [prompt.input_ids for prompt in batch]
        texts = write(model, self._tokenizer, read, BUDGETS[batch[0].task], in_step=world.size > 1)
        return [[self._found(prompt, tokens), len(tokens)] for prompt, tokens in zip(batch, texts, strict=True)]

    def result(self, records: Mapping[str, Sequence[Any]]) -> RulerResult:
        """Answers found by task and length."""
        tasks = self.section.measured
        found = {task: [0] * len(self.lengths) for task in tasks}
        written = {task: [0] * len(self.lengths) for task in tasks}
        for budget, parts in self.parts.items():
            for part, measured in zip(parts, records[str(budget)], strict=True):
                for prompt, (answers, tokens) in zip(part, measured, strict=True):
                    index = self.lengths.index(prompt.length)
                    found[prompt.task][index] += answers
                    written[prompt.task][index] += tokens
        return RulerResult(
            lengths=self.lengths,
            samples=self.section.samples,
            found=found,
            written=written,
            left_out=self.section.left_out,
            prompt="chat" if self.section.uses_chat(self._tokenizer) else "plain",
            mirror=self.section.mirror,
            haystack=self.section.haystack or "generated",
            words=self.section.words or "generated",
        )

    def _found(self, prompt: Prompt, tokens: list[int]) -> int:
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return answers_found(prompt.task, text, prompt.references)


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
