"""Passkey retrieval: find a key that is hidden at some depth of a long prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from sparsetrain.evaluation.base import Drawing, Rows, Share, TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.interval import wilson_interval
from sparsetrain.section import MOST_LISTED, Bounds, Tokens
from sparsetrain.source_section import ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row
    from sparsetrain.world import World

_PROMPTS = Bounds(1000, "each is a prompt of its own, at every length")


class PasskeyResult(TaskResult):
    """Correct passkey prompts by length and depth."""

    wide = True

    task: Literal["passkey"] = "passkey"
    lengths: list[int]
    """Prompt lengths in tokens."""
    depths: list[float]
    """Depths of the key: 0 is the beginning of the prompt, 1 its end."""
    trials: int
    """Prompts in a cell."""
    digits: int
    """Digits of a key."""
    correct: list[list[int]]
    """Number of correct answers, ``[length][depth]``."""

    def accuracy(self) -> list[list[float]]:
        """Share of right answers, ``[length][depth]``."""
        return [[count / self.trials for count in row] for row in self.correct]

    def by_length(self) -> dict[int, float]:
        """Share of right answers at each length, over all depths."""
        cells = self.trials * len(self.depths)
        return {length: sum(row) / cells for length, row in zip(self.lengths, self.correct, strict=True)}

    def mean(self) -> float:
        """Share of right answers over all prompts."""
        return sum(map(sum, self.correct)) / self.prompts()

    def prompts(self) -> int:
        """Prompts in all cells together."""
        return self.trials * len(self.lengths) * len(self.depths)

    def interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`mean`."""
        return wilson_interval(sum(map(sum, self.correct)), self.prompts())

    def metrics(self) -> dict[str, float]:
        """Share of right answers over all prompts, and at each length."""
        return {"": self.mean()} | {f"/{length}": value for length, value in self.by_length().items()}

    def score(self) -> float:
        """Share of right answers over all prompts."""
        return self.mean()

    def accuracy_by_length(self) -> dict[int, Share]:
        """Over all depths, with Wilson's interval."""
        counts, asked = map(sum, self.correct), self.trials * len(self.depths)
        return {n: Share.of(found / asked, asked) for n, found in zip(self.lengths, counts)}

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result and a column for each length, and tables of the depths."""
        trials = next(iter(results.values())).trials
        return TaskReport(
            title=f"Passkeys found by prompt length (prompts at each length and depth: {trials})",
            heading="Passkey retrieval",
            about=f"Keys found by prompt length in tokens. Prompts at each length and depth: {trials}.",
            rows=_length_rows(results),
            shares=True,
            details={label: _depth_rows(result) for label, result in results.items()},
            details_heading="by depth of the key",
        )

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing:
        """A heat map for each result, by length and depth."""
        from sparsetrain.evaluation.panels import few

        shown = few(results)
        return Drawing(lambda figure: _draw(figure, shown, cls.ending(name)), 1 + 4 * len(shown), 3.8)


class PasskeySection(TaskSection):
    """Passkey accuracy by length and depth: is every digit of the hidden key the model's first choice?"""

    result = PasskeyResult
    writes = False

    task: Literal["passkey"] = "passkey"
    """Passkey accuracy by length and depth."""
    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)]
    """Prompt lengths in tokens."""
    depths: Annotated[int, Field(gt=0), _PROMPTS] = 5
    """Depths tried, evenly spread from the beginning (0 %) to the end (100 %)."""
    trials: Annotated[int, Field(gt=0), _PROMPTS] = 5
    """Prompts for each length and depth."""
    digits: Annotated[int, Field(ge=1, le=12)] = 5
    """Digits of the key; chance is 10 to the minus this."""

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The prompts."""
        return {"lengths": self.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest prompt."""
        from sparsetrain.data.synthetic import passkey_prompt
        from sparsetrain.randomness import generator

        with self.blaming("lengths"):
            passkey_prompt(tokenizer, min(*self.lengths, ROOM), 0.5, generator(0), self.digits)

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Passkey:
        """All prompts."""
        return Passkey(self, tokenizer, seed)


@dataclass(frozen=True)
class Prompt:
    """A prompt with its answer, labelled on the answer, and the cell of the grid it belongs to."""

    row: Row
    length_index: int
    depth_index: int


class Passkey(BatchedTask):
    """Passkey prompts on a grid of lengths and depths: the same for every model and every evaluation with one seed.

    A prompt is answered right when every token of the answer is the model's first choice after the prompt and the
    answer's earlier tokens. That is so exactly when greedy decoding writes the answer, and takes one forward pass.

    Raises:
        DataError: a length cannot hold the prompt.
    """

    def __init__(self, section: PasskeySection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        import numpy as np

        self.section = section
        self.trials = section.trials
        self.digits = section.digits
        self.lengths = sorted(set(section.lengths))
        self.depths = [0.5] if section.depths == 1 else np.linspace(0, 1, section.depths).tolist()
        self.groups = [group for index in range(len(self.lengths)) for group in self._groups(index, tokenizer, seed)]

    def answered(self) -> list[Row]:
        """The prompts with their answers."""
        return [prompt.row for group in self.groups for prompt in group]

    def batches(self) -> dict[str, list[list[Prompt]]]:
        """A group of prompts at a time."""
        return {"": self.groups}

    def measure_batch(self, model: PreTrainedModel, batch: list[Prompt], world: World) -> list[bool]:
        """Whether each answer is right."""
        from sparsetrain.data import collate
        from sparsetrain.evaluation.scoring import predictions

        rows = collate([prompt.row for prompt in batch])
        ((logits, labels, documents),) = predictions(model, rows, world.device, num_chunks=1)
        wrong = set(documents[logits.argmax(-1) != labels].tolist())
        return [index not in wrong for index in range(len(batch))]

    def result(self, records: Mapping[str, Sequence[Any]]) -> PasskeyResult:
        """Right answers by length and depth."""
        correct = [[0] * len(self.depths) for _ in self.lengths]
        for group, found in zip(self.groups, records[""], strict=True):
            for prompt, right in zip(group, found, strict=True):
                correct[prompt.length_index][prompt.depth_index] += right
        return PasskeyResult(
            lengths=self.lengths, depths=self.depths, trials=self.trials, digits=self.digits, correct=correct
        )

    def _groups(self, length_index: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[Prompt]]:
        """The prompts of one length, grouped so that a forward pass holds as many as fit into the greatest length."""
        from sparsetrain.data import Row, passkey_prompt
        from sparsetrain.data.batch import IGNORE
        from sparsetrain.randomness import generator

        length = self.lengths[length_index]
        prompts = []
        for depth_index, depth in enumerate(self.depths):
            for trial in range(self.trials):
                rng = generator(seed, "evaluation", length, depth_index, trial)
                with self.section.blaming("lengths"):
                    prompt = passkey_prompt(tokenizer, length, depth, rng, self.digits)
                labels = prompt.input_ids.copy()
                labels[: prompt.answer_start] = IGNORE
                row = Row(prompt.input_ids, labels, [len(labels)], [f"passkey {prompt.key}"])
                prompts.append(Prompt(row, length_index, depth_index))
        fit = self.lengths[-1] // length
        return [prompts[start : start + fit] for start in range(0, len(prompts), fit)]


def _length_rows(results: Mapping[str, PasskeyResult]) -> Rows:
    """A row for each result and a column for each length, in percent, then all lengths with their 95 % interval."""
    lengths = sorted({length for passkey in results.values() for length in passkey.lengths})
    rows = [["", *(f"{length:,}" for length in lengths), "all", "95 % interval"]]
    for label, passkey in results.items():
        shares = passkey.by_length()
        low, high = passkey.interval()
        cells = [f"{shares[length]:.0%}" if length in shares else "-" for length in lengths]
        rows.append([label, *cells, f"{passkey.mean():.0%}", f"{low:.0%} to {high:.0%}"])
    return rows


def _depth_rows(passkey: PasskeyResult) -> Rows:
    """A row for each depth and a column for each length, in percent."""
    rows = [["depth", *(f"{length:,}" for length in passkey.lengths)]]
    for depth, shares in zip(passkey.depths, zip(*passkey.accuracy(), strict=True), strict=True):
        rows.append([f"{depth:.0%}", *(f"{share:.0%}" for share in shares)])
    return rows


def _draw(figure: Any, measured: Mapping[str, PasskeyResult], ending: str) -> None:
    import numpy as np

    from sparsetrain.evaluation.panels import FAINT, draw_cells, put_title, short

    all_axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, (label, passkey) in zip(all_axes, measured.items(), strict=True):
        depths, lengths = [f"{depth:.0%}" for depth in passkey.depths], [short(length) for length in passkey.lengths]
        image = draw_cells(axes, np.array(passkey.accuracy()).T, "{:.0%}", depths, lengths)
        low, high = passkey.interval()
        put_title(axes, f"{label}\n{passkey.mean():.0%} found  [{low:.0%}, {high:.0%}]")
        axes.set_xlabel("prompt length (tokens)")
    all_axes[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=all_axes, fraction=0.02, pad=0.01, format="{x:.0%}", ticks=[0, 0.5, 1])
    passkey = next(iter(measured.values()))
    figure.supxlabel(
        f"passkeys found{ending}; prompts in a cell: {passkey.trials}, in a map: {passkey.prompts()};\n"
        f"[95 % interval]; by chance 1 in {10**passkey.digits:,}",
        fontsize=9,
        color=FAINT,
    )
