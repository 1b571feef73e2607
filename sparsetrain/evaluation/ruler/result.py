"""The scores of RULER, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from sparsetrain.evaluation.base import Drawing, Rows, TaskReport
from sparsetrain.evaluation.generative.result import GenerativeResult
from sparsetrain.evaluation.generative.tally import LENGTH_SAID, Tally, total
from sparsetrain.evaluation.ruler.specs import ANSWERS, BUDGETS, LLAMA_2_7B_AT_4K

HEADINGS = ["mean", "wAvg inc", "wAvg dec", "effective", "worst", "written"]


class RulerResult(GenerativeResult):
    """Answers found, by task and length. Scores are percentages, as in the paper."""

    task: Literal["ruler"] = "ruler"
    tallies: dict[str, list[Tally]]
    """What was counted of each task, ``[length]``. A prompt asks for as many answers as :data:`ANSWERS` says."""
    left_out: dict[str, str]
    """Tasks that were not measured although all were asked for, and why."""
    mirror: bool
    """Whether prompts were drawn as NVIDIA's scripts do."""
    words: str
    """The words of keys and lists: the user's folder, or ``generated``."""

    def parts(self) -> dict[str, list[Tally]]:
        """The tasks."""
        return self.tallies

    def answers(self, part: str) -> int:
        """Those of a task."""
        return ANSWERS[part]

    def prompts(self) -> str:
        """Prompts of each task and length, or from how many to how many."""
        counts = {tally.asked for tallies in self.tallies.values() for tally in tallies}
        return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"

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

    def interval(self, task: str, index: int) -> tuple[float, float] | None:
        """The 95 % interval of a score; None where a prompt can be answered in part."""
        if ANSWERS[task] > 1:
            return None
        low, high = self.tallies[task][index].interval()
        return 100 * low, 100 * high

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
        for task, shares in self.shares().items():
            numbers |= {f"/{length}/{task}": share for length, share in zip(self.lengths, shares, strict=True)}
        return numbers

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result, and a table of its tasks."""
        one = next(iter(results.values()))
        return TaskReport(
            title=f"RULER by length (mean of {len(one.tallies)} tasks, prompts of each: {one.prompts()})",
            heading="RULER",
            about=one._about(),
            rows=cls.rows_by_length(results, HEADINGS, _cells),
            details={label: result._details() for label, result in results.items()},
            details_heading="by task",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and task."""
        said = f"RULER{cls.ending(name)}; prompts in a cell: {next(iter(results.values())).prompts()}"
        return cls.heat_maps(results, said, lambda each: f"mean {each.mean():.1f}, worst {each.worst()[2]:.1f}", 5)

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
        return f"{self.shares()[task][index]:.1f}{within}"


def _cells(result: RulerResult) -> list[str]:
    effective = result.effective_length()
    return [
        f"{result.mean():.1f}",
        f"{result.weighted(to_long=True):.1f}",
        f"{result.weighted(to_long=False):.1f}",
        ("none" if effective is None else f"{effective:,}")
        + ("" if result.is_whole() else f" of {len(result.tallies)} tasks"),
        result.worst_said(),
        result.texts().length(),
    ]
