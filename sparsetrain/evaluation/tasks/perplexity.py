"""Token perplexity by context length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.base import Drawing, LossMarks, Rows, TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.section import MOST_LISTED, Bounds, Tokens
from sparsetrain.source_section import DataSource

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row
    from sparsetrain.world import World


class PerplexityResult(TaskResult):
    """Perplexity of one stream of held-out tokens at each length."""

    task: Literal["perplexity"] = "perplexity"
    perplexity: dict[int, float]
    """Token perplexity by context length in tokens."""
    tokens: int
    """Tokens in the stream that was scored at each length."""

    def metrics(self) -> dict[str, float]:
        """Perplexity at each length."""
        return {f"/{length}": value for length, value in self.perplexity.items()}

    def score(self) -> float:
        """Minus the perplexity at the greatest length."""
        return -self.perplexity[max(self.perplexity)]

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and a column for each length."""
        lengths = sorted({length for result in results.values() for length in result.perplexity})
        rows: Rows = [["", *(f"{length:,}" for length in lengths)]]
        for label, result in results.items():
            values = (result.perplexity.get(length) for length in lengths)
            rows.append([label, *("-" if value is None else _significant(value) for value in values)])
        tokens = max(result.tokens for result in results.values())
        title = "Perplexity by context length"
        about = (
            f"Non-overlapping windows over the same {tokens:,} held-out tokens; the first of a window is not scored."
        )
        return TaskReport(title, title, about, rows)

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """Perplexity against length, a line for each result."""
        title = f"Perplexity by context length{cls.ending(name)}"
        points = {label: sorted(result.perplexity.items()) for label, result in results.items()}
        return Drawing(lambda axes: _draw(axes, title, points, trained_length), 7, 4.5)

    @classmethod
    def loss_marks(cls, name: str, lines: Sequence[Mapping[str, Any]]) -> LossMarks | None:
        """Perplexity at the greatest length, as its logarithm and in words as itself."""
        begins = f"eval/{name}/"
        lengths = {int(key.removeprefix(begins)) for line in lines for key in line if key.startswith(begins)}
        if not lengths:
            return None
        key = f"{begins}{max(lengths)}"
        marks = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        label = f"ln perplexity at {max(lengths):,} tokens{cls.ending(name)}"
        return LossMarks(label, [(step, math.log(value), f"{value:.3g}") for step, value in marks])


class PerplexitySection(TaskSection):
    """Token perplexity by context length: ``exp`` of the mean NLL over non-overlapping windows of each length."""

    result = PerplexityResult

    task: Literal["perplexity"] = "perplexity"
    """Perplexity by context length."""
    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)]
    """Context lengths in tokens."""
    source: DataSource
    """Held-out documents, read in order and joined."""
    tokens: Annotated[int, Field(gt=0), Bounds(10**10, "they are scored one window after another")] = 65536
    """Tokens to score at each length."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Fewer tokens than a window has."""
        yield from super().faults()
        if self.source.synthetic is not None:
            yield "source.synthetic", "perplexity is measured on text, not on a synthetic task; give path"
        if max(self.lengths) > self.tokens:
            yield (
                "tokens",
                f"{self.tokens} tokens hold no window of {self.path('lengths')}={max(self.lengths)}",
            )

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The windows."""
        return {"lengths": self.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing beyond the first row of its source."""

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Perplexity:
        """The held-out tokens, read."""
        return Perplexity(self, tokenizer)


class Perplexity(BatchedTask):
    """Perplexity of one stream of held-out tokens, cut into non-overlapping windows of each length.

    The same stream is scored at every length (its last window may be shorter). Nothing is put before a window (no BOS),
    and its first token, which nothing precedes, is not scored; the mean context is therefore half the length.

    Raises:
        RecipeError: a length is longer than the stream, or too short to score anything.
        DataError: the source cannot be read or holds fewer tokens than asked for.
    """

    def __init__(self, section: PerplexitySection, tokenizer: PreTrainedTokenizerBase) -> None:
        from sparsetrain.data import token_stream

        for length in section.lengths:
            if not 2 <= length <= section.tokens:
                raise RecipeError(
                    f"{section.path('lengths')}: a window of {length} tokens is not between 2 and "
                    f"{section.path('tokens')} ({section.tokens}); change one of the two"
                )
        stream = token_stream(section.source, tokenizer, section.tokens)
        self.tokens = section.tokens
        self.lengths = sorted(set(section.lengths))
        # Short windows share a row, so that every row costs about as much as one window of the greatest length.
        self.rows = {length: window_rows(stream, length, self.lengths[-1]) for length in self.lengths}

    def batches(self) -> dict[str, list[Row]]:
        """A row at a time."""
        return {str(length): rows for length, rows in self.rows.items()}

    def measure_batch(self, model: PreTrainedModel, batch: Row, world: World) -> list[float]:
        """Summed NLL in nats, and scored tokens."""
        import torch.nn.functional as F

        from sparsetrain.data import collate
        from sparsetrain.evaluation.scoring import CHUNK, predictions

        nll, tokens = 0.0, 0
        for logits, labels, _ in predictions(
            model, collate([batch]), world.device, num_chunks=math.ceil(self.lengths[-1] / CHUNK)
        ):
            # fp64, since fp32 would lose digits over a million terms.
            nll += F.cross_entropy(logits, labels, reduction="none").double().sum().item()
            tokens += len(labels)
        return [nll, tokens]

    def result(self, records: Mapping[str, Sequence[Any]]) -> PerplexityResult:
        """Perplexity by length."""
        import numpy as np

        perplexity = {}
        for length in self.lengths:
            nll, tokens = (math.fsum(each) for each in zip(*records[str(length)], strict=True))
            perplexity[length] = float(np.exp(nll / tokens))
        return PerplexityResult(perplexity=perplexity, tokens=self.tokens)


def window_rows(stream: np.ndarray, length: int, row_tokens: int) -> list[Row]:
    """Non-overlapping windows of ``length`` tokens, as many in a row as fit into ``row_tokens``."""
    windows = [stream[start : start + length] for start in range(0, len(stream) - 1, length)]
    fit = row_tokens // length
    return [_row(windows[start : start + fit]) for start in range(0, len(windows), fit)]


def _row(windows: list[np.ndarray]) -> Row:
    import numpy as np

    from sparsetrain.data import Row
    from sparsetrain.data.batch import IGNORE

    labels = [np.concatenate([[IGNORE], window[1:]]) for window in windows]
    return Row(np.concatenate(windows), np.concatenate(labels), [len(w) for w in windows], [""] * len(windows))


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def _draw(axes: Axes, title: str, points_of: Mapping[str, list[tuple[int, float]]], trained_length: int | None) -> None:
    from matplotlib.ticker import LogLocator

    from sparsetrain.evaluation.panels import FAINT, PAPER, SERIES, few, put_title, short

    put_title(axes, title)
    measured = few(points_of)
    for (label, points), (color, marker) in zip(measured.items(), cycle(SERIES)):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=2, label=label)
        end = f"{points[-1][1]:.3g}"
        axes.annotate(end, points[-1], (7, 0), textcoords="offset points", va="center", color=color)
    values = [value for points in measured.values() for _, value in points]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
    lengths = sorted({length for points in measured.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    if trained_length is not None:
        axes.axvline(trained_length, color=FAINT, linestyle=":", label="trained length")
    axes.margins(x=0.1)
    axes.set(xlabel="context length (tokens)", ylabel="perplexity")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=PAPER)
    axes.legend(loc="best", edgecolor="none")
