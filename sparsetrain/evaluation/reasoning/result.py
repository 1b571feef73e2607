"""What was answered of the questions of reasoning, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from sparsetrain.evaluation.base import Drawing, Rows, TaskReport
from sparsetrain.evaluation.generative.result import GenerativeResult
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


class ReasoningResult(GenerativeResult):
    """Right answers by kind, hops and length. The shares are percentages."""

    task: Literal["reasoning"] = "reasoning"
    rows: list[Row]
    facts: int
    """Sentences of a story."""

    def parts(self) -> dict[str, list[Tally]]:
        """The kinds, with their hops."""
        return {row.label: row.tallies for row in self.rows}

    def chance(self) -> float:
        """What guesses find, in the mean over rows and lengths."""
        return 100 * sum(sum(row.chance) for row in self.rows) / (len(self.rows) * len(self.lengths))

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
        for label, shares in self.shares().items():
            name = label.replace(" ", "_")
            numbers |= {f"/{length}/{name}": share for length, share in zip(self.lengths, shares, strict=True)}
        return numbers

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its kinds."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"Reasoning by length (mean of {len(one.rows)} kinds, prompts of each: {one._prompts()})",
            heading="Reasoning",
            about=one._about(),
            rows=cls.rows_by_length(results, ["mean", "chance", "worst", "written"], _cells),
            details={label: result._details() for label, result in results.items()},
            details_heading="by kind",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and kind."""
        one = next(iter(results.values()))
        said = f"reasoning{cls.ending(name)}; prompts in a cell: {one._prompts()}"

        def words(each: Self) -> str:
            return f"mean {each.mean():.1f}, worst {each.worst()[2]:.1f}, by chance {each.chance():.1f}"

        return cls.heat_maps(results, said, words, 2 + 0.25 * len(one.rows))

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


def _cells(result: ReasoningResult) -> list[str]:
    return [f"{result.mean():.1f}", f"{result.chance():.1f}", result.worst_said(), result.texts().length()]
