"""Preference: the share of held-out pairs of answers in which the model ranks the preferred one first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparsetrain.counted import counted
from sparsetrain.errors import DataError
from sparsetrain.evaluation.base import Share, TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.section import Bounds, Tokens
from sparsetrain.source_section import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row
    from sparsetrain.world import World

Answers = tuple[float, float]
"""A number of the preferred answer, and of the rejected one."""


class PreferenceResult(TaskResult):
    """Log-likelihoods of both answers of each pair."""

    task: Literal["preference"] = "preference"
    pairs: list[Answers]
    """Log-likelihoods of both answers in nats, summed over their tokens."""
    tokens: list[Answers]
    """Tokens of both answers."""
    digest: str
    """Equal for equal pairs."""
    first: list[Answers] | None = None
    """The log-likelihoods in the first evaluation of the run, or for the first row; None in that one."""

    def accuracy(self) -> float:
        """Share of pairs whose preferred answer is the likelier one."""
        return sum(chosen > rejected for chosen, rejected in self.pairs) / len(self.pairs)

    def accuracy_by_token(self) -> float:
        """The same by the mean over an answer's tokens, which does not favour short answers."""
        means = [[value / count for value, count in zip(*each)] for each in zip(self.pairs, self.tokens)]
        return sum(chosen > rejected for chosen, rejected in means) / len(means)

    def margin(self) -> float:
        """Mean difference of the log-likelihoods, in nats."""
        return math.fsum(chosen - rejected for chosen, rejected in self.pairs) / len(self.pairs)

    def rewards(self) -> list[float]:
        """The difference of each pair beyond that of the first evaluation, in nats; empty in that one."""
        both = zip(self.pairs, self.first or ())
        return [(chosen - rejected) - (before[0] - before[1]) for (chosen, rejected), before in both]

    def metrics(self) -> dict[str, float]:
        """Shares of pairs that are ranked right, and the margins."""
        found = {"": self.accuracy(), "/by_token": self.accuracy_by_token(), "/margin": self.margin()}
        if rewards := self.rewards():
            found["/reward_accuracy"] = sum(reward > 0 for reward in rewards) / len(rewards)
            found["/reward_margin"] = math.fsum(rewards) / len(rewards)
        return found

    def score(self) -> float:
        """Share of pairs whose preferred answer is the likelier one."""
        return self.accuracy()

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result."""
        rows = [["", "preferred first", "95 % interval", "by token", "margin", "reward > 0", "reward margin", "pairs"]]
        for label, result in results.items():
            found = result.metrics()
            share = Share.of(found[""], len(result.pairs))
            cells = [f"{share.value:.1%}", f"{share.low:.1%} to {share.high:.1%}", f"{found['/by_token']:.1%}"]
            cells.append(f"{found['/margin']:.2f}")
            cells.append(f"{found['/reward_accuracy']:.1%}" if "/reward_accuracy" in found else "")
            cells.append(f"{found['/reward_margin']:.2f}" if "/reward_margin" in found else "")
            rows.append([label, *cells, f"{len(result.pairs):,}"])
        about = (
            "Held-out pairs whose preferred answer is the likelier one, summed over its tokens and by token. The "
            "margin is the difference of log-likelihoods in nats; the reward margin is what it has gained since the "
            "first row."
        )
        return TaskReport("Preferred answers ranked first", "Preference", about, rows)


class PreferenceSection(TaskSection):
    """Share of held-out pairs of answers in which the model ranks the preferred one first, and the margin."""

    result = PreferenceResult
    writes = False
    pair_fields = ("source",)

    task: Literal["preference"] = "preference"
    """Held-out pairs of a preferred and a rejected answer."""
    source: DataSource
    """Rows with ``chosen`` and ``rejected``, read in order."""
    pairs: Annotated[int, Field(gt=0), Bounds(10**6, "each is measured")] = 200
    """Pairs to read."""
    length: Tokens = 4096
    """Tokens of a pass. Several pairs share it; a longer pair is refused."""

    @model_validator(mode="after")
    def _has_rows(self) -> PreferenceSection:
        if self.source.synthetic is not None:
            raise ValueError("source: synthetic tasks have no pairs of answers; give path")
        return self

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The passes."""
        return {"length": [self.length]}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing is made: all inputs are rows of files."""

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Preference:
        """All pairs, read."""
        return Preference(self, tokenizer)


class Preference(BatchedTask):
    """Held-out pairs, in the order of the source, as many in a row as fit.

    Raises:
        DataError: The source cannot be read, has fewer pairs than asked for, or one that does not fit.
    """

    def __init__(self, section: PreferenceSection, tokenizer: PreTrainedTokenizerBase) -> None:
        self.first: PreferenceResult | None = None
        with section.blaming("source"):
            self.rows = _read(section, tokenizer)
        parts = b"".join(row.input_ids.tobytes() + row.labels.tobytes() for row in self.rows)
        self.digest = hashlib.sha256(parts).hexdigest()[:16]

    def follow(self, first: TaskResult) -> None:
        """Rewards count from the first evaluation."""
        # A run that goes on may measure another kind of task under this name than it began with.
        self.first = first if isinstance(first, PreferenceResult) else None

    def batches(self) -> dict[str, list[Row]]:
        """A row at a time."""
        return {"": self.rows}

    def measure_batch(self, model: PreTrainedModel, batch: Row, world: World) -> list[list[float]]:
        """Log-likelihood and tokens of each document."""
        import numpy as np
        import torch
        import torch.nn.functional as F

        from sparsetrain.data import collate
        from sparsetrain.evaluation.scoring import CHUNK, predictions

        num_chunks = max(math.ceil(len(row.input_ids) / CHUNK) for row in self.rows)
        losses, documents = [], []
        for logits, labels, of in predictions(model, collate([batch]), world.device, num_chunks):
            losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
            documents.append(of.cpu())
        number = torch.cat(documents).numpy()
        size = len(batch.lengths)
        sums = np.bincount(number, torch.cat(losses).numpy(), minlength=size)
        return [(-sums).tolist(), np.bincount(number, minlength=size).tolist()]

    def result(self, records: Mapping[str, Sequence[Any]]) -> PreferenceResult:
        """All pairs in order."""
        values, tokens = ([value for record in records[""] for value in record[part]] for part in (0, 1))
        pairs = list(zip(values[::2], values[1::2]))
        # Other pairs under the same name, as where a resumed run measures others, say nothing about these.
        same = self.first is not None and self.first.digest == self.digest
        first = self.first.pairs if self.first is not None and same else None
        counts = list(zip(tokens[::2], tokens[1::2]))
        return PreferenceResult(pairs=pairs, tokens=counts, digest=self.digest, first=first)


def _read(section: PreferenceSection, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    from sparsetrain.data.document import MIN_TOKENS, Document, Piece
    from sparsetrain.data.sources import open_source, rows_of
    from sparsetrain.data.values import FIX, MalformedRow

    label = section.source.label
    opened = open_source(section.source, tokenizer, streaming=section.source.streaming, pairs=True)
    packed: list[list[Piece]] = []
    found = room = 0
    for index, raw in enumerate(rows_of(section.source, opened.open())):
        try:
            tokens = opened.reader.tokens(raw, tokenizer)
        except MalformedRow as problem:
            raise DataError(f"data source {label!r}: {opened.reader.place(raw, index)}: {problem}. {FIX}") from problem
        size = len(tokens.input_ids)
        if size < MIN_TOKENS:
            continue
        if size > section.length:
            raise DataError(
                f"data source {label!r}: {opened.reader.place(raw, index)}: a pair of {size:,} tokens does not fit "
                f"{section.path('length')}={section.length}; raise it"
            )
        if size > room:
            packed, room = [*packed, []], section.length
        packed[-1].append(Piece(Document.of(f"{label}:{index}", tokens), 0, size))
        room, found = room - size, found + 1
        if found == section.pairs:
            return [_row(pieces) for pieces in packed]
    raise DataError(
        f"data source {label!r} has only {counted(found, 'pair')} of answers; lower {section.path('pairs')}"
    )


def _row(pieces: Sequence[Any]) -> Row:
    import numpy as np

    from sparsetrain.data import Row

    return Row(
        np.concatenate([piece.input_ids() for piece in pieces]),
        np.concatenate([piece.labels() for piece in pieces]),
        [length for piece in pieces for length in piece.lengths],
        [piece.origin for piece in pieces for _ in piece.lengths],
    )
