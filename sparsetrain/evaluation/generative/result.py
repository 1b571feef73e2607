"""What the results of tasks with generated prompts have in common: right answers by part and length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, Self

from sparsetrain.evaluation.base import Drawing, Rows, Share, TaskResult
from sparsetrain.evaluation.generative.tally import Tally, total


class GenerativeResult(TaskResult):
    """Right answers by part (a task, a kind of questions, a turn) and length. Shares are percentages."""

    wide = True

    lengths: list[int]
    """Tokens of prompt and answer, ascending."""
    prompt: Literal["chat", "plain"]
    """Whether prompts were turns of a chat."""
    haystack: str
    """The text around what is asked for: the user's file, or ``generated``."""

    @abstractmethod
    def parts(self) -> Mapping[str, list[Tally]]:
        """What was counted of each part, ``[length]``."""

    def answers(self, part: str) -> int:
        """Answers that a prompt asks for."""
        return 1

    def shares(self) -> dict[str, list[float]]:
        """The share of right answers of each part, ``[length]``."""
        return {
            part: [100 * tally.share() / self.answers(part) for tally in tallies]
            for part, tallies in self.parts().items()
        }

    def means(self) -> list[float]:
        """The mean over parts at each length."""
        every = self.shares().values()
        return [sum(shares) / len(shares) for shares in zip(*every, strict=True)]

    def mean(self) -> float:
        """The mean over lengths, each of equal weight."""
        return sum(self.means()) / len(self.lengths)

    def worst_at(self, index: int) -> tuple[str, float]:
        """The part with the lowest share at a length, and this share."""
        share, part = min((shares[index], part) for part, shares in self.shares().items())
        return part, share

    def worst(self) -> tuple[str, int, float]:
        """Part, length and share of the lowest share."""
        share, length, part = min(
            (share, -length, part)
            for part, shares in self.shares().items()
            for length, share in zip(self.lengths, shares, strict=True)
        )
        return part, -length, share

    def texts(self) -> Tally:
        """What was counted of all texts together."""
        return total(tally for tallies in self.parts().values() for tally in tallies)

    def score(self) -> float:
        """The mean over parts and lengths."""
        return self.mean()

    def accuracy_by_length(self) -> dict[int, Share]:
        """The mean over parts, of the prompts of all, as if those were independent."""
        asked = [sum(tally.asked for tally in tallies) for tallies in zip(*self.parts().values(), strict=True)]
        return {n: Share.of(mean / 100, count) for n, mean, count in zip(self.lengths, self.means(), asked)}

    def worst_said(self) -> str:
        """The lowest share, with its part and length."""
        from sparsetrain.evaluation.panels import short

        part, length, share = self.worst()
        return f"{share:.1f} {part} at {short(length)}"

    @classmethod
    def rows_by_length(
        cls, results: Mapping[str, Self], headings: list[str], cells: Callable[[Self], list[str]]
    ) -> Rows:
        """A table with a row for each result: the mean at each length, and other cells below their headings."""
        lengths = sorted({length for result in results.values() for length in result.lengths})
        rows = [["", *(f"{length:,}" for length in lengths), *headings]]
        for label, result in results.items():
            means = dict(zip(result.lengths, result.means(), strict=True))
            rows.append([label, *(f"{means[each]:.1f}" if each in means else "-" for each in lengths), *cells(result)])
        return rows

    @classmethod
    def heat_maps(cls, results: Mapping[str, Self], said: str, words: Callable[[Self], str], height: float) -> Drawing:
        """A heat map for each result, by length and part.

        Args:
            said: of all, beside the scale.
            words: the second line of a map's title.
            height: inches.
        """
        from sparsetrain.evaluation.panels import Grid, draw_grids, few

        grids = {
            f"{label}\n{words(result)}": Grid([*result.parts()], result.lengths, [*result.shares().values()])
            for label, result in few(results).items()
        }
        return Drawing(lambda figure: draw_grids(figure, grids, said), 2 + 4 * len(grids), height)
