"""What was answered in turn, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, TaskReport
from sparsetrain.evaluation.generative.result import GenerativeResult
from sparsetrain.evaluation.generative.tally import LENGTH_SAID, Tally, total

HEADINGS = ["mean", "first turn", "last turn", "without a mistake", "worst", "written"]


class Spoken(BaseModel):
    """The conversations of one length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    turns: list[Tally]
    """By turn."""
    distances: list[Tally]
    """By the distance of the answer, up to each bound of the result."""
    every: int
    """Conversations all of whose answers are right."""


class MultiTurnResult(GenerativeResult):
    """Right answers by length, turn and distance. The shares are percentages."""

    task: Literal["multi_turn"] = "multi_turn"
    samples: int
    """Conversations of each length."""
    keys: int
    """Keys in a text: a guess among their numbers is right once in so many times."""
    spoken: list[Spoken]
    """What was counted, ``[length]``."""
    bounds: list[int]
    """Tokens between the sentence that tells an answer and the answer, at most; ascending."""

    def parts(self) -> dict[str, list[Tally]]:
        """The turns."""
        return {f"turn {turn + 1}": [spoken.turns[turn] for spoken in self.spoken] for turn in self._turns()}

    def turn(self, index: int) -> Tally:
        """What was counted of a turn, over all lengths."""
        return total(spoken.turns[index] for spoken in self.spoken)

    def every(self) -> float:
        """The share of conversations all of whose answers are right."""
        return 100 * sum(spoken.every for spoken in self.spoken) / (self.samples * len(self.lengths))

    def metrics(self) -> dict[str, float]:
        """The mean; the first and the last turn; conversations without a mistake; the worst; how long answers are; and
        at each length the mean and every turn."""
        numbers = {
            "": self.mean(),
            "/first": 100 * self.turn(0).share(),
            "/last": 100 * self.turn(-1).share(),
            "/every": self.every(),
            "/worst": self.worst()[2],
            **self.texts().length_metrics(),
        }
        for length, mean, spoken in zip(self.lengths, self.means(), self.spoken, strict=True):
            turns = {f"/{length}/turn_{turn}": 100 * each.share() for turn, each in enumerate(spoken.turns, start=1)}
            numbers |= {f"/{length}": mean, **turns}
        return numbers

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its turns and distances."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"Questions in turn by length (conversations: {one.samples}, turns: {len(one._turns())})",
            heading="Questions in turn",
            about=one._about(),
            rows=cls.rows_by_length(results, HEADINGS, _cells),
            details={label: result._details() for label, result in results.items()},
            details_heading="by turn and distance",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and turn."""
        one = next(iter(results.values()))
        said = f"questions in turn{cls.ending(name)}; conversations in a cell: {one.samples}"

        def words(each: Self) -> str:
            return f"mean {each.mean():.1f}, without a mistake {each.every():.1f}"

        return cls.heat_maps(results, said, words, 2 + 0.3 * len(one._turns()))

    def _turns(self) -> range:
        return range(len(self.spoken[0].turns))

    def _about(self) -> str:
        return " ".join(
            [
                f"Right answers in percent, by tokens of a conversation; {self.samples} conversations of each length, "
                f"{'as turns of a chat' if self.prompt == 'chat' else 'without a template'}, answered from one cache.",
                f"A text tells the numbers of {self.keys} keys, so a guess among them is right in "
                f"{100 / self.keys:.1f} %; filler: {self.haystack}.",
                "Distance: tokens between the sentence that tells the answer and the answer.",
                LENGTH_SAID,
            ]
        )

    def _details(self) -> Rows:
        """A row for each turn and each distance, and a column for each length."""

        def row(label: str, tallies: list[Tally]) -> list[str]:
            cells = [tally.cell() if tally.asked else "-" for tally in tallies]
            every = total(tallies)
            return [label, *cells, every.length() if every.asked else "-"]

        rows = [["", *(f"{length:,}" for length in self.lengths), "written"]]
        rows += [row(label, tallies) for label, tallies in self.parts().items()]
        for index, bound in enumerate(self.bounds):
            rows.append(row(f"distance up to {bound:,}", [spoken.distances[index] for spoken in self.spoken]))
        every = [f"{100 * spoken.every / self.samples:.1f}" for spoken in self.spoken]
        return [*rows, ["without a mistake", *every, ""]]


def _cells(result: MultiTurnResult) -> list[str]:
    first, last = result.turn(0).cell(), result.turn(-1).cell()
    return [f"{result.mean():.1f}", first, last, f"{result.every():.1f}", result.worst_said(), result.texts().length()]
