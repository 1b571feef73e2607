"""The result of the task ``perplexity``: numbers and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

from sparsetrain.evaluation.base import Drawing, LossMarks, Rows, TaskReport, TaskResult
from sparsetrain.evaluation.text.definition import TextDefinition, definition_rows
from sparsetrain.evaluation.text.losses import Losses
from sparsetrain.evaluation.text.positions import Bucket
from sparsetrain.evaluation.text.tables import DIFFERENCE, columns_of, difference_cell, difference_rows, significant


class PerplexityResult(TaskResult):
    """Perplexity of one text at each length, and its loss by position in the longest windows."""

    wide = True

    task: Literal["perplexity"] = "perplexity"
    perplexity: dict[int, float]
    """Token perplexity by tokens of a window."""
    tokens: int
    """Tokens of the text that was read at each length."""
    definition: TextDefinition | None = None
    """What was scored."""
    losses: dict[int, Losses] = {}
    """Losses by tokens of a window."""
    positions: list[Bucket] = []
    """Losses by position in the longest windows."""
    trailing: Losses | None = None
    """Losses of the last tokens of the longest windows; None where there is no such token."""
    trailing_from: int = 0
    """The fewest tokens that precede one of them."""

    def metrics(self) -> dict[str, float]:
        """Perplexity at each length, trailing loss, and loss by the first position of each bucket."""
        numbers = {f"/{length}": value for length, value in self.perplexity.items()}
        if self.trailing is not None:
            numbers["/trailing_loss"] = self.trailing.mean()
        return numbers | {f"/position/{bucket.first}": bucket.losses.mean() for bucket in self.positions}

    def score(self) -> float:
        """Minus the perplexity at the greatest length."""
        return -self.perplexity[max(self.perplexity)]

    def pairs_with(self, other: Self) -> bool:
        """Whether both scored the same tokens with the same context."""
        mine, theirs = self.definition, other.definition
        return (
            mine is not None
            and theirs is not None
            and mine.same_tokens(theirs)
            and self.losses.keys() == other.losses.keys()
            and self.trailing_from == other.trailing_from
            and [bucket.first for bucket in self.positions] == [bucket.first for bucket in other.positions]
        )

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and a column for each length; what was scored; differences; loss by position."""
        tokens = max(result.tokens for result in results.values())
        about = f"Perplexity over {tokens:,} held-out tokens, by tokens of a window."
        details: dict[str, Rows] = {}
        defined = {label: result.definition for label, result in results.items() if result.definition is not None}
        if defined:
            about = f"{about} {[*defined.values()][-1].words()}"
        details |= definition_rows(defined)
        details |= _differences(results)
        details |= _by_position(results)
        return TaskReport(
            "Perplexity by context length", "Perplexity by context length", about, _rows(results), details=details
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """Perplexity against length, loss against position, and its difference from the first result."""
        from sparsetrain.evaluation.panels import few
        from sparsetrain.evaluation.text.drawing import draw_side_by_side, perplexity_panels

        shown = few(results)
        panels = perplexity_panels(
            {label: result.perplexity for label, result in shown.items()},
            {label: result.positions for label, result in shown.items() if result.positions},
            list(_paired(shown)),
            ending=cls.ending(name),
            trained_length=trained_length,
        )
        return Drawing(partial(draw_side_by_side, panels=panels), 1.0 + 6.0 * len(panels), 4.5, panels)

    @classmethod
    def loss_marks(cls, name: str, lines: Sequence[Mapping[str, Any]]) -> LossMarks | None:
        """Perplexity at the greatest length, as its logarithm and in words as itself."""
        begins = f"eval/{name}/"
        endings = {key.removeprefix(begins) for line in lines for key in line if key.startswith(begins)}
        lengths = {int(ending) for ending in endings if ending.isdecimal()}
        if not lengths:
            return None
        key = f"{begins}{max(lengths)}"
        marks = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        label = f"ln perplexity at {max(lengths):,} tokens{cls.ending(name)}"
        return LossMarks(label, [(step, math.log(value), f"{value:.3g}") for step, value in marks])


def _rows(results: Mapping[str, PerplexityResult]) -> Rows:
    lengths = columns_of(list(results.values()), lambda result: list(result.perplexity))
    rows: Rows = [["", *(f"{length:,}" for length in lengths)]]
    starts = columns_of(list(results.values()), lambda result: [result.trailing_from] if result.trailing else [])
    rows[0] += [f"loss from position {start:,}" for start in starts]
    for label, result in results.items():
        values = (result.perplexity.get(length) for length in lengths)
        cells = ["-" if value is None else significant(value) for value in values]
        for start in starts:
            here = result.trailing if result.trailing_from == start else None
            cells.append("-" if here is None else f"{here.mean():.4f}")
        rows.append([label, *cells])
    return rows


def _paired(results: Mapping[str, PerplexityResult]) -> dict[str, PerplexityResult]:
    """The first result with losses, and those that scored the same tokens; none if there is no other."""
    measured = {label: result for label, result in results.items() if result.losses}
    first = next(iter(measured.values()), None)
    paired = {label: result for label, result in measured.items() if first is not None and result.pairs_with(first)}
    return paired if len(paired) > 1 else {}


def _differences(results: Mapping[str, PerplexityResult]) -> dict[str, Rows]:
    paired = _paired(results)
    if not paired:
        return {}
    label, first = next(iter(paired.items()))
    columns: dict[str, Callable[[PerplexityResult], Losses | None]] = {
        f"{length:,}": partial(_losses_at, length=length) for length in first.losses
    }
    if first.trailing is not None:
        columns[f"from position {first.trailing_from:,}"] = lambda result: result.trailing
    return {DIFFERENCE.format(label): difference_rows(paired, columns)}


def _losses_at(result: PerplexityResult, *, length: int) -> Losses | None:
    return result.losses.get(length)


def _by_position(results: Mapping[str, PerplexityResult]) -> dict[str, Rows]:
    """A row for each bucket of the longest windows and a column for each result, with the difference from the first."""
    from sparsetrain.evaluation.panels import few

    longest = max((length for result in results.values() for length in result.losses), default=0)
    measured = few(
        {label: result for label, result in results.items() if result.positions and longest in result.losses}
    )
    if not measured:
        return {}
    paired, first = _paired(measured), next(iter(measured))
    found = {label: {bucket.label(): bucket for bucket in result.positions} for label, result in measured.items()}
    buckets = {bucket.label(): bucket for each in found.values() for bucket in each.values()}
    header = ["tokens before", "tokens"]
    for label in measured:
        header += [label, "difference"] if label in paired and label != first else [label]
    rows = [header]
    for name, bucket in sorted(buckets.items(), key=lambda item: (item[1].first, item[1].stop)):
        row = [name, f"{bucket.losses.tokens:,}"]
        for label in measured:
            mine, theirs = (found[each][name].losses if name in found[each] else None for each in (label, first))
            row.append("-" if mine is None else f"{mine.mean():.4f}")
            row += [difference_cell(mine, theirs)] if label in paired and label != first else []
        rows.append(row)
    return {f"Loss by position in windows of {longest:,} tokens (nats)": rows}
