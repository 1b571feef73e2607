"""Several questions about one text, answered in turn from one cache, which drops nothing that a later one needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.multi_turn.result import MultiTurnResult, Spoken
from sparsetrain.evaluation.multi_turn.settings import MultiTurnSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row
    from sparsetrain.evaluation.generative.writing import TextWriter
    from sparsetrain.evaluation.multi_turn.prompts import Talk
    from sparsetrain.world import World

HALVINGS = 4
"""Distances are told apart up to the greatest length halved so many times."""
BEFORE = " is"
"""The word before an answer."""


class MultiTurnSection(MultiTurnSettings):
    """Questions about one text, answered in turn from one cache."""

    result = MultiTurnResult

    task: Literal["multi_turn"] = "multi_turn"
    """Questions in turn."""

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest conversation, and the file."""
        from sparsetrain.evaluation.multi_turn.prompts import Talks

        Talks(self, tokenizer, seed=0).smallest()

    def make(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Talk]:
        """All conversations."""
        from sparsetrain.evaluation.multi_turn.prompts import Talks

        return Talks(self, tokenizer, seed).all()

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> MultiTurn:
        """All conversations."""
        return MultiTurn(self, tokenizer, seed)


class MultiTurn(BatchedTask):
    """Conversations: the texts and questions are the same for every model and every evaluation with one seed.

    What the model answers stays in the cache, as in a chat, and is what later questions stand behind.

    Raises:
        DataError: a length has no room for the questions, or the file cannot be read.
    """

    def __init__(self, section: MultiTurnSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.section, self._tokenizer = section, tokenizer
        self.talks: list[Talk] = section.made(tokenizer, seed)
        self._writer: TextWriter | None = None
        self._breaks: set[int] | None = None

    def answered(self) -> list[Row]:
        """The conversations with right answers; that of the last turn is to be written."""
        import numpy as np

        from sparsetrain.data import Row
        from sparsetrain.data.batch import IGNORE
        from sparsetrain.data.encoding import encode_after

        rows = []
        for index, talk in enumerate(self.talks):
            said = [encode_after(self._tokenizer, BEFORE, f" {turn.answer}") for turn in talk.turns]
            ids = np.concatenate([part for turn, answer in zip(talk.turns, said) for part in (turn.input_ids, answer)])
            labels = np.full_like(ids, IGNORE)
            labels[-len(said[-1]) :] = said[-1]
            rows.append(Row(ids.astype(np.int64), labels.astype(np.int64), [len(ids)], [f"conversation {index}"]))
        return rows

    def batches(self) -> Mapping[str, Sequence[Talk]]:
        """One conversation at a time: answers of a batch would end at different places."""
        return {"conversations": self.talks}

    def measure_batch(self, model: PreTrainedModel, batch: Talk, world: World) -> list[list[int]]:
        """Of each turn whether it is right, the tokens written, whether the budget ended it, and how far it is from the
        sentence that tells the answer."""
        from sparsetrain.evaluation.generative.writing import TextWriter
        from sparsetrain.evaluation.multi_turn.prompts import BUDGET
        from sparsetrain.modeling.sharding import is_sharded

        if self._writer is None or self._writer.model is not model:
            self._writer = TextWriter(model, self._tokenizer, in_step=world.size > 1 and is_sharded(model))
        talk = self._writer.conversation(batch.length)
        record = []
        for turn in batch.turns:
            text = talk.ask(turn.input_ids.tolist(), BUDGET, self._ends())
            said = str(self._tokenizer.decode(text.tokens, skip_special_tokens=True))
            distance = len(talk.tokens) - len(text.tokens) - turn.place
            record.append([int(turn.answer in said), len(text.tokens), int(text.cut), distance])
        return record

    def result(self, records: Mapping[str, Sequence[Any]]) -> MultiTurnResult:
        """The sums by turn and by distance."""
        if self._writer is not None:
            self._writer.release()
        self._writer = None
        lengths = sorted(self.section.lengths)
        bounds = [lengths[-1] >> halved for halved in reversed(range(HALVINGS + 1))]
        spoken = {
            length: Spoken(turns=[Tally()] * self.section.turns, distances=[Tally()] * len(bounds), every=0)
            for length in lengths
        }
        for talk, record in zip(self.talks, records["conversations"], strict=True):
            told = spoken[talk.length]
            for turn, (right, written, cut, distance) in enumerate(record):
                counted = Tally.of(right, written, cut)
                told.turns[turn] += counted
                told.distances[next(at for at, bound in enumerate(bounds) if distance <= bound)] += counted
            spoken[talk.length] = told.model_copy(update={"every": told.every + all(each[0] for each in record)})
        return MultiTurnResult(
            lengths=lengths,
            samples=self.section.samples,
            keys=self.section.keys,
            spoken=[spoken[length] for length in lengths],
            bounds=bounds,
            prompt=self.section.asked_by(self._tokenizer),
            haystack=self.section.haystack or "generated",
        )

    def _ends(self) -> set[int]:
        """Tokens that end an answer beside those that end a text: without turns of a chat a break of the line does."""
        if self._breaks is None:
            from sparsetrain.generation.texts import line_breaks

            self._breaks = set() if self.section.uses_chat(self._tokenizer) else line_breaks(self._tokenizer)
        return self._breaks
