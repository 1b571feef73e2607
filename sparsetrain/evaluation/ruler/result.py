"""The scores of RULER, as numbers and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

from sparsetrain.evaluation.base import Drawing, Rows, Share, TaskReport, TaskResult
from sparsetrain.evaluation.generative.tally import LENGTH_SAID, Tally, total
from sparsetrain.evaluation.ruler.specs import ANSWERS, BUDGETS, LLAMA_2_7B_AT_4K


class RulerResult(TaskResult):
    """Answers found, by task and length. Scores are percentages, as in the paper."""

    wide = True

    task: Literal["ruler"] = "ruler"
    lengths: list[int]
    """Tokens of prompt and answer, ascending."""
    tallies: dict[str, list[Tally]]
    """What was counted of each task, ``[length]``. A prompt asks for as many answers as :data:`ANSWERS` says."""
    left_out: dict[str, str]
    """Tasks that were not measured although all were asked for, and why."""
    prompt: Literal["chat", "plain"]
    """Whether prompts were turns of a chat."""
    mirror: bool
    """Whether prompts were drawn as NVIDIA's scripts do."""
    haystack: str
    """The essay: the user's file, or ``generated``."""
    words: str
    """The words of keys and lists: the user's folder, or ``generated``."""

    def scores(self, task: str) -> list[float]:
        """The score of a task at each length."""
        return [100 * tally.share() / ANSWERS[task] for tally in self.tallies[task]]

    def means(self) -> list[float]:
        """The mean over tasks at each length."""
        every = [self.scores(task) for task in self.tallies]
        return [sum(scores) / len(scores) for scores in zip(*every, strict=True)]

    def prompts(self) -> str:
        """Prompts of each task and length, or from how many to how many."""
        counts = {tally.asked for tallies in self.tallies.values() for tally in tallies}
        return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"

    def mean(self) -> float:
        """The mean over lengths, each of equal weight."""
        return sum(self.means()) / len(self.lengths)

    def weighted(self, *, to_long: bool) -> float:
        """The mean over lengths with weights 1, 2, 3 and so on, growing towards long or short ones: the paper's wAvg
        (inc) and (dec)."""
        weights = range(1, len(self.lengths) + 1)
        means = self.means() if to_long else self.means()[::-1]
        return sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)

    def effective_length(self) -> int | None:
        """The greatest length whose mean is above :data:`LLAMA_2_7B_AT_4K`; None if there is none."""
        return max(
            (n for n, mean in zip(self.lengths, self.means(), strict=True) if mean > LLAMA_2_7B_AT_4K), default=None
        )

    def worst(self) -> tuple[str, int, float]:
        """The task, length and score of the lowest score."""
        cells = ((score, -length, task) for task, length, score in self._cells())
        score, length, task = min(cells)
        return task, -length, score

    def worst_at(self, index: int) -> tuple[str, float]:
        """The task with the lowest score at a length, and this score."""
        score, task = min((self.scores(task)[index], task) for task in self.tallies)
        return task, score

    def interval(self, task: str, index: int) -> tuple[float, float] | None:
        """The 95 % interval of a score; None where a prompt can be answered in part."""
        if ANSWERS[task] > 1:
            return None
        low, high = self.tallies[task][index].interval()
        return 100 * low, 100 * high

    def texts(self) -> Tally:
        """What was counted of all texts together."""
        return total(tally for tallies in self.tallies.values() for tally in tallies)

    def is_whole(self) -> bool:
        """Whether all tasks were measured, as in the paper."""
        return len(self.tallies) == len(BUDGETS)

    def metrics(self) -> dict[str, float]:
        """The mean; at each length the mean, the worst and every task; the lowest score of all; the weighted means; how
        long texts are; and the effective length, where no task is left out."""
        numbers = {
            "": self.mean(),
            "/worst": self.worst()[2],
            "/weighted_inc": self.weighted(to_long=True),
            "/weighted_dec": self.weighted(to_long=False),
            **self.texts().length_metrics(),
        }
        if self.is_whole():
            numbers["/effective_length"] = float(self.effective_length() or 0)
        for index, (length, mean) in enumerate(zip(self.lengths, self.means(), strict=True)):
            numbers |= {f"/{length}": mean, f"/{length}/worst": self.worst_at(index)[1]}
        return numbers | {f"/{length}/{task}": score for task, length, score in self._cells()}

    def score(self) -> float:
        """The mean over tasks and lengths."""
        return self.mean()

    def accuracy_by_length(self) -> dict[int, Share]:
        """The mean over tasks, of the prompts of all."""
        asked = [sum(tallies[index].asked for tallies in self.tallies.values()) for index in range(len(self.lengths))]
        return {n: Share.of(mean / 100, count) for n, mean, count in zip(self.lengths, self.means(), asked)}

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its tasks."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"RULER by length (mean of {len(one.tallies)} tasks, prompts of each: {one.prompts()})",
            heading="RULER",
            about=one._about(),
            rows=_rows(results),
            details={label: result._details() for label, result in results.items()},
            details_heading="by task",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and task."""
        from sparsetrain.evaluation.panels import Grid, draw_grids, few

        grids = {
            f"{label}\nmean {result.mean():.1f}, worst {result.worst()[2]:.1f}": Grid(
                [*result.tallies], result.lengths, [result.scores(task) for task in result.tallies]
            )
            for label, result in few(results).items()
        }
        said = f"RULER{cls.ending(name)}; prompts in a cell: {next(iter(results.values())).prompts()}"
        return Drawing(lambda figure: draw_grids(figure, grids, said), 2 + 4 * len(grids), 5)

    def _cells(self) -> Iterator[tuple[str, int, float]]:
        for task in self.tallies:
            yield from ((task, *cell) for cell in zip(self.lengths, self.scores(task), strict=True))

    def _about(self) -> str:
        """What the numbers are of."""
        drawn = "as NVIDIA's scripts draw them" if self.mirror else "each with a seed of its own"
        said = [
            f"Share of the answers found, in percent, by tokens of prompt and answer; {self.prompts()} prompts of each "
            f"task and length, {drawn}, {'turns of a chat' if self.prompt == 'chat' else 'without a chat template'}.",
            f"Essay: {self.haystack}; words: {self.words}.",
            f"Effective length: the greatest whose mean is above {LLAMA_2_7B_AT_4K} (Llama-2-7B-chat at 4K).",
            "wAvg: lengths weigh more towards long (inc) or short (dec) ones.",
            LENGTH_SAID,
        ]
        if not self.is_whole():
            said.append(f"Means and effective length are those of {len(self.tallies)} of the {len(BUDGETS)} tasks.")
        if self.left_out:
            said.append(f"Left out: {', '.join(f'{task} ({reason})' for task, reason in self.left_out.items())}.")
        return " ".join(said)

    def _details(self) -> Rows:
        """A row for each task and a column for each length, then the mean and the worst; and the tokens written."""
        rows = [["task", *(f"{length:,}" for length in self.lengths), "written"]]
        for task in self.tallies:
            cells = [self._cell(task, index) for index in range(len(self.lengths))]
            rows.append([task, *cells, f"{total(self.tallies[task]).length()} at {BUDGETS[task]}"])
        worst = [self.worst_at(index) for index in range(len(self.lengths))]
        rows.append(["mean", *(f"{mean:.1f}" for mean in self.means()), ""])
        return [*rows, ["worst", *(f"{score:.1f} {task}" for task, score in worst), ""]]

    def _cell(self, task: str, index: int) -> str:
        interval = self.interval(task, index)
        within = "" if interval is None else f" [{interval[0]:.0f}, {interval[1]:.0f}]"
        return f"{self.scores(task)[index]:.1f}{within}"


def _rows(results: Mapping[str, RulerResult]) -> Rows:
    from sparsetrain.evaluation.panels import short

    lengths = sorted({length for result in results.values() for length in result.lengths})
    rows = [
        ["", *(f"{length:,}" for length in lengths), "mean", "wAvg inc", "wAvg dec", "effective", "worst", "written"]
    ]
    for label, result in results.items():
        means = dict(zip(result.lengths, result.means(), strict=True))
        effective, (task, length, score) = result.effective_length(), result.worst()
        rows.append(
            [
                label,
                *(f"{means[length]:.1f}" if length in means else "-" for length in lengths),
                *(f"{value:.1f}" for value in (result.mean(), result.weighted(to_long=True))),
                f"{result.weighted(to_long=False):.1f}",
                ("none" if effective is None else f"{effective:,}")
                + ("" if result.is_whole() else f" of {len(result.tallies)} tasks"),
                f"{score:.1f} {task} at {short(length)}",
                result.texts().length(),
            ]
        )
    return rows
