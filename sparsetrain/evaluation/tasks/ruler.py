"""RULER (2404.06654): 13 tasks of retrieval, tracing, aggregation and questions, at several lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.generative.task import Cell, GenerativeTask, Prompt
from sparsetrain.evaluation.ruler.result import RulerResult
from sparsetrain.evaluation.ruler.settings import RulerSettings
from sparsetrain.evaluation.ruler.specs import ANSWERS, answers_found

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RulerSection(RulerSettings):
    """The 13 tasks of RULER: what a model writes greedily behind a prompt is searched for the answers."""

    result = RulerResult

    task: Literal["ruler"] = "ruler"
    """RULER."""

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest prompt of each task, and the files."""
        from sparsetrain.evaluation.ruler.prompts import Prompts

        Prompts(self, tokenizer, seed=0).smallest()

    def make(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Prompt]:
        """All prompts."""
        from sparsetrain.evaluation.ruler.prompts import Prompts

        return Prompts(self, tokenizer, seed).all()

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Ruler:
        """All prompts."""
        return Ruler(self, tokenizer, seed)


class Ruler(GenerativeTask):
    """RULER's prompts: the same for every model and every evaluation with one seed.

    Raises:
        DataError: a length has no room for a task, or a file cannot be read.
    """

    def __init__(self, section: RulerSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__(tokenizer, section.made(tokenizer, seed))
        self.section = section
        self._asked_by = section.asked_by(tokenizer)

    def right(self, prompt: Prompt, text: str) -> int:
        """Answers found in a text."""
        return answers_found(prompt.key, text, prompt.references)

    def answers(self, prompt: Prompt) -> int:
        """Those of a task."""
        return ANSWERS[prompt.key]

    def summary(self, tallies: Mapping[Cell, Tally]) -> RulerResult:
        """Answers found by task and length."""
        lengths = sorted(self.section.lengths)
        return RulerResult(
            lengths=lengths,
            tallies={task: [tallies[task, length] for length in lengths] for task in self.section.measured},
            left_out=self.section.left_out,
            prompt=self._asked_by,
            mirror=self.section.mirror,
            haystack=self.section.haystack or "generated",
            words=self.section.words or "generated",
        )
