"""Recall: the fraction of answers of a synthetic task that the model finds in held-out documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparsetrain.evaluation.base import TaskReport, TaskResult, TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.interval import wilson_interval
from sparsetrain.section import Bounds
from sparsetrain.source_section import ROOM, DataSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row
    from sparsetrain.data.document import Document
    from sparsetrain.world import World

TOKENS = 4096
"""Shorter documents share a forward pass of up to so many tokens."""


class RecallResult(TaskResult):
    """Answers found in the held-out documents of a synthetic source."""

    task: Literal["recall"] = "recall"
    answers: int
    """Answers asked for."""
    correct: int
    """Answers of which every token was the model's first choice."""
    loss: float
    """Mean NLL of the answers' tokens, in nats."""

    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.answers

    def interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`accuracy`, as if the answers of a document were independent."""
        return wilson_interval(self.correct, self.answers)

    def metrics(self) -> dict[str, float]:
        """Share of right answers, and the loss."""
        return {"": self.accuracy(), "_loss": self.loss}

    def score(self) -> float:
        """Share of right answers."""
        return self.accuracy()

    @classmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """A row for each result: answers found, their 95 % interval, the loss."""
        rows = [["", "found", "95 % interval", "answers", "loss"]]
        for label, recall in results.items():
            low, high = recall.interval()
            cells = [
                f"{recall.accuracy():.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{recall.answers:,}",
                f"{recall.loss:.3f}",
            ]
            rows.append([label, *cells])
        about = "Answers found in held-out documents of the synthetic task."
        return TaskReport("Answers found in held-out documents", "Recall", about, rows)


class RecallSection(TaskSection):
    """Share of the answers in held-out documents of a synthetic source that are the model's first choice, token by
    token, and the loss on them."""

    result = RecallResult
    writes = False

    task: Literal["recall"] = "recall"
    """Answers found in a synthetic task."""
    source: DataSource
    """The task: a source with ``synthetic`` and its ``lengths``. Its documents are never those of training."""
    documents: Annotated[int, Field(gt=0), Bounds(10**6, "each is answered on its own")] = 200
    """Documents to answer."""

    @model_validator(mode="after")
    def _lengths_known(self) -> RecallSection:
        if self.source.synthetic is None or not self.source.lengths:
            raise ValueError("source: give synthetic (passkey, multikey or recall) and its lengths")
        return self

    @classmethod
    def suggested(cls, lengths: list[int]) -> dict[str, Any]:
        """Key and value tokens."""
        return {"source": {"synthetic": "recall", "lengths": lengths}}

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The documents."""
        return {"source.lengths": self.source.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest document."""
        from sparsetrain.data.synthetic import synthetic_task
        from sparsetrain.randomness import generator

        with self.blaming("source"):
            synthetic_task(self.source, tokenizer).document(min(*self.source.lengths, ROOM), generator(0))

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Recall:
        """All documents."""
        return Recall(self, tokenizer, seed)


@dataclass(frozen=True)
class Questions:
    """The documents of one forward pass."""

    rows: list[Row]
    answers: torch.Tensor
    """int64 ``[labelled tokens]``: which answer of the pass each of them belongs to."""

    @classmethod
    def of(cls, documents: list[Document]) -> Questions:
        """The documents, each in a row of its own, and the spans of their answers one after the other."""
        import numpy as np
        import torch

        spans = [span for document in documents for span in document.tokens.targets]
        answers = np.repeat(np.arange(len(spans)), [last - first for first, last in spans])
        return cls([_row(document) for document in documents], torch.from_numpy(answers))


class Recall(BatchedTask):
    """Held-out documents of a synthetic source: the same for every model and every evaluation with one seed.

    An answer is right when each of its tokens is the model's first choice after the question and the answer's earlier
    tokens, which is so exactly when greedy decoding writes it.

    Raises:
        DataError: the task has no room in one of the lengths, or no tokens in this vocabulary.
    """

    def __init__(self, section: RecallSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        from sparsetrain.data.document import Document
        from sparsetrain.data.synthetic import synthetic_task
        from sparsetrain.randomness import generator

        with section.blaming("source"):
            task = synthetic_task(section.source, tokenizer)
            lengths = sorted(set(section.source.lengths))
            documents = []
            for index in range(section.documents):
                tokens = task.document(lengths[index % len(lengths)], generator(seed, "evaluation", "recall", index))
                documents.append(Document.of(f"{section.source.label}:{index}", tokens))
        fit = max(1, TOKENS // lengths[-1])
        self.passes = [Questions.of(documents[start : start + fit]) for start in range(0, len(documents), fit)]
        self.num_answers = sum(len(document.tokens.targets) for document in documents)

    def answered(self) -> list[Row]:
        """The documents."""
        return [row for questions in self.passes for row in questions.rows]

    def batches(self) -> dict[str, list[Questions]]:
        """Several documents at a time."""
        return {"": self.passes}

    def measure_batch(self, model: PreTrainedModel, batch: Questions, world: World) -> list[float]:
        """Right answers, summed NLL in nats, and scored tokens."""
        import torch
        import torch.nn.functional as F

        from sparsetrain.data import collate
        from sparsetrain.evaluation.scoring import CHUNK, predictions

        num_chunks = max(math.ceil(len(questions.answers) / CHUNK) for questions in self.passes)
        right, nll = [], 0.0
        for logits, labels, _ in predictions(model, collate(batch.rows), world.device, num_chunks):
            right.append((logits.argmax(-1) == labels).cpu())
            nll += F.cross_entropy(logits, labels, reduction="sum").item()
        answers = batch.answers
        wrong = answers[~torch.cat(right)].unique()
        return [int(answers[-1]) + 1 - len(wrong), nll, len(answers)]

    def result(self, records: Mapping[str, Sequence[Any]]) -> RecallResult:
        """Right answers and the loss."""
        found, nll, tokens = (math.fsum(each) for each in zip(*records[""], strict=True))
        return RecallResult(answers=self.num_answers, correct=round(found), loss=nll / tokens)


def _row(document: Document) -> Row:
    from sparsetrain.data import Row
    from sparsetrain.data.document import Piece

    piece = Piece(document, 0, document.length)
    return Row(piece.input_ids(), piece.labels(), [piece.length], [piece.origin])
