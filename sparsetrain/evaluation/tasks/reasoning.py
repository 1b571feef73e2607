"""Questions whose answer follows from several facts of a long text: stories among filler, and walks in graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.generative.task import Cell, GenerativeTask, Prompt
from sparsetrain.evaluation.reasoning.result import ReasoningResult, Row
from sparsetrain.evaluation.reasoning.settings import ReasoningSettings
from sparsetrain.evaluation.reasoning.specs import ReasoningPrompt, is_right, key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReasoningSection(ReasoningSettings):
    """Questions that take one or several facts of a story, or edges of a graph, which are scattered over the text."""

    result = ReasoningResult

    task: Literal["reasoning"] = "reasoning"
    """Reasoning over a long text."""

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest prompt of each kind, and the file."""
        from sparsetrain.evaluation.reasoning.prompts import ReasoningPrompts

        ReasoningPrompts(self, tokenizer, seed=0).smallest()

    def make(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
        """All prompts."""
        from sparsetrain.evaluation.reasoning.prompts import ReasoningPrompts

        return ReasoningPrompts(self, tokenizer, seed).all()

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Reasoning:
        """All prompts."""
        return Reasoning(self, tokenizer, seed)


class Reasoning(GenerativeTask):
    """The questions: the same for every model and every evaluation with one seed.

    Raises:
        DataError: a length has no room for a kind, or the file cannot be read.
    """

    def __init__(self, section: ReasoningSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._prompts: list[ReasoningPrompt] = section.made(tokenizer, seed)
        super().__init__(tokenizer, self._prompts)
        self.section = section
        self._asked_by = section.asked_by(tokenizer)

    def right(self, prompt: Prompt, text: str) -> int:
        """Whether a text gives the answer."""
        assert isinstance(prompt, ReasoningPrompt)
        return int(is_right(prompt.key.partition("/")[0], text, prompt.options, prompt.references))

    def summary(self, tallies: Mapping[Cell, Tally]) -> ReasoningResult:
        """Right answers by kind, hops and length."""
        lengths = sorted(self.section.lengths)
        guessed = dict.fromkeys(tallies, 0.0)
        for prompt in self._prompts:
            guessed[prompt.key, prompt.length] += prompt.chance
        rows = [
            Row(
                kind=kind,
                hops=hops,
                tallies=[tallies[key(kind, hops), length] for length in lengths],
                chance=[guessed[key(kind, hops), length] / self.section.samples for length in lengths],
            )
            for kind, hops in self.section.measured
        ]
        return ReasoningResult(
            lengths=lengths,
            rows=rows,
            facts=self.section.facts,
            prompt=self._asked_by,
            haystack=self.section.haystack or "generated",
        )
