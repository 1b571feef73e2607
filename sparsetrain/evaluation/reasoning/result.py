"""What was answered of the questions of reasoning, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, Share, TaskReport, TaskResult
from sparsetrain.evaluation.generative.tally import LENGTH_SAID, Tally, total


class Row(BaseModel):
    """A kind of questions with a number of hops."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    hops: int | None
    """Facts or edges that the answer follows from; None where that is no fixed number."""
    tallies: list[Tally]
    """What was counted, ``[length]``."""
    chance: list[float]
    """Share that guesses find, ``[length]``."""

    @property
    def label(self) -> str:
        """The kind, and its hops where it has several."""
        return f"{self.kind} {self.hops}" if self.kind in ("walk", "bfs") else self.kind


class ReasoningResult(TaskResult):
    """Right answers by kind, hops and length. The shares are percentages."""

    wide = True

    task: Literal["reasoning"] = "reasoning"
    lengths: list[int]
    """Tokens of prompt and answer, ascending."""
    rows: list[Row]
    facts: int
    """Sentences of a story."""
    prompt: Literal["chat", "plain"]
    """Whether prompts were turns of a chat."""
    haystack: str
    """The filler: the user's file, or ``generated``."""

    def shares(self, index: int) -> dict[str, float]:
        """The share of each row at a length."""
        return {row.label: 100 * row.tallies[index].share() for row in self.rows}

    def means(self) -> list[float]:
        """The mean over rows at each length."""
        return [sum(shares.values()) / len(self.rows) for shares in map(self.shares, range(len(self.lengths)))]

    def mean(self) -> float:
        """The mean over lengths, each of equal weight."""
        return sum(self.means()) / len(self.lengths)

    def chance(self) -> float:
        """What guesses find, in the mean over rows and lengths."""
        return 100 * sum(sum(row.chance) for row in self.rows) / (len(self.rows) * len(self.lengths))

    def worst_at(self, index: int) -> tuple[str, float]:
        """The row with the lowest share at a length, and this share."""
        share, label = min((share, label) for label, share in self.shares(index).items())
        return label, share

    def worst(self) -> tuple[str, int, float]:
        """Row, length and share of the lowest share."""
        share, length, label = min(
            (share, -length, label)
            for index, length in enumerate(self.lengths)
            for label, share in self.shares(index).items()
        )
        return label, -length, share

    def texts(self) -> Tally:
        """What was counted of all texts together."""
        return total(tally for row in self.rows for tally in row.tallies)

    def metrics(self) -> dict[str, float]:
        """The mean and chance; at each length the mean, the worst and every row; how long texts are."""
        numbers = {
            "": self.mean(),
            "/worst": self.worst()[2],
            "/chance": self.chance(),
            **self.texts().length_metrics(),
        }
        for index, (length, mean) in enumerate(zip(self.lengths, self.means(), strict=True)):
            numbers |= {f"/{length}": mean, f"/{length}/worst": self.worst_at(index)[1]}
            numbers |= {f"/{length}/{label.replace(' ', '_')}": share for label, share in self.shares(index).items()}
        return numbers

    def score(self) -> float:
        """The mean over rows and lengths."""
        return self.mean()

    def accuracy_by_length(self) -> dict[int, Share]:
        """The mean over rows, of the prompts of all."""
        asked = [sum(row.tallies[index].asked for row in self.rows) for index in range(len(self.lengths))]
        return {n: Share.of(mean / 100, count) for n, mean, count in zip(self.lengths, self.means(), asked)}

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its kinds."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"Reasoning by length (mean of {len(one.rows)} kinds, prompts of each: {one._prompts()})",
            heading="Reasoning",
            about=one._about(),
            rows=_rows(results),
            details={label: result._details() for label, result in results.items()},
            details_heading="by kind",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and kind."""
        from sparsetrain.evaluation.panels import Grid, draw_grids, few

        grids = {
            f"{label}\nmean {result.mean():.1f}, worst {result.worst()[2]:.1f}, by chance {result.chance():.1f}": Grid(
                [row.label for row in result.rows],
                result.lengths,
                [[100 * tally.share() for tally in row.tallies] for row in result.rows],
            )
            for label, result in few(results).items()
        }
        one = next(iter(results.values()))
        said = f"reasoning{cls.ending(name)}; prompts in a cell: {one._prompts()}"
        return Drawing(lambda figure: draw_grids(figure, grids, said), 2 + 4 * len(grids), 2 + 0.25 * len(one.rows))

    def _prompts(self) -> int:
        return self.rows[0].tallies[0].asked

    def _about(self) -> str:
        return " ".join(
            [
                f"Right answers in percent [95 % interval], by tokens of prompt and answer; {self._prompts()} prompts "
                f"of each kind and length, {'as turns of a chat' if self.prompt == 'chat' else 'without a template'}.",
                f"Stories have {self.facts} sentences; filler: {self.haystack}.",
                "Hops: sentences or edges that an answer follows from. Chance: a guess among all possible answers, or "
                "among all sets as large as the right one.",
                LENGTH_SAID,
            ]
        )

    def _details(self) -> Rows:
        """A row for each kind and a column for each length, then the mean and the worst."""
        rows = [["kind", "hops", *(f"{length:,}" for length in self.lengths), "chance", "written"]]
        for row in self.rows:
            chance = 100 * sum(row.chance) / len(row.chance)
            rows.append(
                [
                    row.kind,
                    "-" if row.hops is None else str(row.hops),
                    *(tally.cell() for tally in row.tallies),
                    f"{chance:.1f}",
                    total(row.tallies).length(),
                ]
            )
        worst = [self.worst_at(index) for index in range(len(self.lengths))]
        rows.append(["mean", "", *(f"{mean:.1f}" for mean in self.means()), f"{self.chance():.1f}", ""])
        return [*rows, ["worst", "", *(f"{share:.1f} {label}" for label, share in worst), "", ""]]


def _rows(results: Mapping[str, ReasoningResult]) -> Rows:
    from sparsetrain.evaluation.panels import short

    lengths = sorted({length for result in results.values() for length in result.lengths})
    rows = [["", *(f"{length:,}" for length in lengths), "mean", "chance", "worst", "written"]]
    for name, result in results.items():
        means = dict(zip(result.lengths, result.means(), strict=True))
        label, length, share = result.worst()
        rows.append(
            [
                name,
                *(f"{means[each]:.1f}" if each in means else "-" for each in lengths),
                f"{result.mean():.1f}",
                f"{result.chance():.1f}",
                f"{share:.1f} {label} at {short(length)}",
                result.texts().length(),
            ]
        )
    return rows
