"""What was answered in turn, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, Share, TaskReport, TaskResult
from sparsetrain.evaluation.generative.tally import LENGTH_SAID, Tally, total


class Spoken(BaseModel):
    """The conversations of one length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    turns: list[Tally]
    """By turn."""
    distances: list[Tally]
    """By the distance of the answer, up to each bound of the result."""
    every: int
    """Conversations all of whose answers are right."""


class MultiTurnResult(TaskResult):
    """Right answers by length, turn and distance. The shares are percentages."""

    wide = True

    task: Literal["multi_turn"] = "multi_turn"
    lengths: list[int]
    """Tokens of a conversation, ascending."""
    samples: int
    """Conversations of each length."""
    keys: int
    """Keys in a text: a guess among their numbers is right once in so many times."""
    spoken: list[Spoken]
    """What was counted, ``[length]``."""
    bounds: list[int]
    """Tokens between the sentence that tells an answer and the answer, at most; ascending."""
    prompt: Literal["chat", "plain"]
    """Whether questions were turns of a chat."""
    haystack: str
    """The filler: the user's file, or ``generated``."""

    def means(self) -> list[float]:
        """The share of right answers at each length."""
        return [100 * total(spoken.turns).share() for spoken in self.spoken]

    def mean(self) -> float:
        """The mean over lengths, each of equal weight."""
        return sum(self.means()) / len(self.lengths)

    def turn(self, index: int) -> Tally:
        """What was counted of a turn, over all lengths."""
        return total(spoken.turns[index] for spoken in self.spoken)

    def every(self) -> float:
        """The share of conversations all of whose answers are right."""
        return 100 * sum(spoken.every for spoken in self.spoken) / (self.samples * len(self.lengths))

    def worst(self) -> tuple[int, int, float]:
        """The turn, counted from 1, the length and the share of the lowest share."""
        share, length, turn = min(
            (100 * tally.share(), -length, turn)
            for length, spoken in zip(self.lengths, self.spoken, strict=True)
            for turn, tally in enumerate(spoken.turns, start=1)
        )
        return turn, -length, share

    def texts(self) -> Tally:
        """What was counted of all answers together."""
        return total(tally for spoken in self.spoken for tally in spoken.turns)

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

    def score(self) -> float:
        """The mean over lengths."""
        return self.mean()

    def accuracy_by_length(self) -> dict[int, Share]:
        """Over all turns, as if the answers of a conversation were independent."""
        asked = [total(spoken.turns).asked for spoken in self.spoken]
        return {n: Share.of(mean / 100, count) for n, mean, count in zip(self.lengths, self.means(), asked)}

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its turns and distances."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"Questions in turn by length (conversations: {one.samples}, turns: {len(one._turns())})",
            heading="Questions in turn",
            about=one._about(),
            rows=_rows(results),
            details={label: result._details() for label, result in results.items()},
            details_heading="by turn and distance",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and turn."""
        from sparsetrain.evaluation.panels import Grid, draw_grids, few

        one = next(iter(results.values()))
        grids = {
            f"{label}\nmean {result.mean():.1f}, without a mistake {result.every():.1f}": Grid(
                [f"turn {turn + 1}" for turn in result._turns()],
                result.lengths,
                [[100 * spoken.turns[turn].share() for spoken in result.spoken] for turn in result._turns()],
            )
            for label, result in few(results).items()
        }
        said = f"questions in turn{cls.ending(name)}; conversations in a cell: {one.samples}"
        return Drawing(lambda figure: draw_grids(figure, grids, said), 2 + 4 * len(grids), 2 + 0.3 * len(one._turns()))

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
        for turn in self._turns():
            rows.append(row(f"turn {turn + 1}", [spoken.turns[turn] for spoken in self.spoken]))
        for index, bound in enumerate(self.bounds):
            rows.append(row(f"distance up to {bound:,}", [spoken.distances[index] for spoken in self.spoken]))
        every = [f"{100 * spoken.every / self.samples:.1f}" for spoken in self.spoken]
        return [*rows, ["without a mistake", *every, ""]]


def _rows(results: Mapping[str, MultiTurnResult]) -> Rows:
    from sparsetrain.evaluation.panels import short

    lengths = sorted({length for result in results.values() for length in result.lengths})
    headings = ["mean", "first turn", "last turn", "without a mistake", "worst", "written"]
    rows = [["", *(f"{length:,}" for length in lengths), *headings]]
    for name, result in results.items():
        means = dict(zip(result.lengths, result.means(), strict=True))
        turn, length, share = result.worst()
        rows.append(
            [
                name,
                *(f"{means[each]:.1f}" if each in means else "-" for each in lengths),
                f"{result.mean():.1f}",
                result.turn(0).cell(),
                result.turn(-1).cell(),
                f"{result.every():.1f}",
                f"{share:.1f} turn {turn} at {short(length)}",
                result.texts().length(),
            ]
        )
    return rows
