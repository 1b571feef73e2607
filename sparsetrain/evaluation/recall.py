"""Recall: how many answers of a synthetic task does the model find in documents it was not trained on?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data import Row, collate
from sparsetrain.data.document import Document, Piece
from sparsetrain.data.randomness import generator
from sparsetrain.data.synthetic import synthetic_task
from sparsetrain.errors import DataError
from sparsetrain.evaluation.result import RecallResult
from sparsetrain.evaluation.scoring import CHUNK, Place, deal, predictions, sum_over_ranks
from sparsetrain.recipe.schema import RecallSection

TOKENS = 4096
"""Shorter documents share a forward pass of up to so many tokens."""


@dataclass(frozen=True)
class Questions:
    """The documents of one forward pass."""

    rows: list[Row]
    answers: torch.Tensor
    """int64 ``[labelled tokens]``: which answer of the pass each of them belongs to."""

    @classmethod
    def of(cls, documents: list[Document]) -> Questions:
        """The documents, each in a row of its own, and the spans of their answers one after the other."""
        spans = [span for document in documents for span in document.tokens.targets]
        answers = np.repeat(np.arange(len(spans)), [last - first for first, last in spans])
        return cls([_row(document) for document in documents], torch.from_numpy(answers))


class Recall:
    """Held-out documents of a synthetic source: the same for every model and every evaluation with one seed.

    An answer is right when each of its tokens is the model's first choice after the question and the answer's earlier
    tokens, which is so exactly when greedy decoding writes it.

    Raises:
        DataError: the task has no room in one of the lengths, or no tokens in this vocabulary.
    """

    def __init__(self, section: RecallSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        try:
            task = synthetic_task(section.source, tokenizer)
            lengths = sorted(set(section.source.lengths))
            documents = []
            for index in range(section.documents):
                tokens = task.document(lengths[index % len(lengths)], generator(seed, "evaluation", "recall", index))
                documents.append(Document.of(f"{section.source.label}:{index}", tokens))
        except DataError as error:
            raise DataError(f"eval.recall.source: {error}") from error
        fit = max(1, TOKENS // lengths[-1])
        self.passes = [Questions.of(documents[start : start + fit]) for start in range(0, len(documents), fit)]
        self.num_answers = sum(len(document.tokens.targets) for document in documents)

    def num_forwards(self, world: int) -> int:
        """Forward passes of each rank."""
        return math.ceil(len(self.passes) / world)

    def measure(self, model: PreTrainedModel, place: Place) -> RecallResult:
        """Right answers and the loss. Every rank makes equally many forward passes and gets the same result."""
        # Right answers, summed NLL and scored tokens; exact in fp64.
        sums = torch.zeros(3, dtype=torch.float64)
        num_chunks = max(math.ceil(len(questions.answers) / CHUNK) for questions in self.passes)
        for questions, weight in deal(self.passes, place):
            right, nll = [], 0.0
            for logits, labels, _ in predictions(model, collate(questions.rows), place.device, num_chunks):
                right.append((logits.argmax(-1) == labels).cpu())
                nll += F.cross_entropy(logits, labels, reduction="sum").item()
            answers = questions.answers
            wrong = answers[~torch.cat(right)].unique()
            found = int(answers[-1]) + 1 - len(wrong)
            sums += weight * torch.tensor([found, nll, len(answers)], dtype=torch.float64)
            place.on_forward()
        found, nll, tokens = sum_over_ranks(sums, place).tolist()
        return RecallResult(answers=self.num_answers, correct=round(found), loss=nll / tokens)


def _row(document: Document) -> Row:
    piece = Piece(document, 0, document.length)
    return Row(piece.input_ids(), piece.labels(), [piece.length], [piece.origin])
