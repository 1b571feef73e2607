"""Token perplexity by context length."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data import Row, collate, token_stream
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import RecipeError
from sparsetrain.evaluation.scoring import CHUNK, Place, deal, predictions, sum_over_ranks
from sparsetrain.recipe.schema import PerplexitySection


class Perplexity:
    """Perplexity of one stream of held-out tokens, cut into non-overlapping windows of each length.

    The same stream is scored at every length (its last window may be shorter). Nothing is put before a window (no BOS),
    and its first token, which nothing precedes, is not scored; the mean context is therefore half the length.

    Raises:
        RecipeError: a length is longer than the stream, or too short to score anything.
        DataError: the source cannot be read or holds fewer tokens than asked for.
    """

    def __init__(self, section: PerplexitySection, tokenizer: PreTrainedTokenizerBase) -> None:
        for length in section.lengths:
            if not 2 <= length <= section.tokens:
                raise RecipeError(
                    f"eval.perplexity.lengths: a window of {length} tokens is not between 2 and eval.perplexity.tokens "
                    f"({section.tokens}); change one of the two"
                )
        stream = token_stream(section.source, tokenizer, section.tokens)
        self.tokens = section.tokens
        self.lengths = sorted(set(section.lengths))
        # Short windows share a row, so that every row costs about as much as one window of the greatest length.
        self.rows = {length: window_rows(stream, length, self.lengths[-1]) for length in self.lengths}

    def num_forwards(self, world: int) -> int:
        """Forward passes of each rank."""
        return sum(math.ceil(len(rows) / world) for rows in self.rows.values())

    def measure(self, model: PreTrainedModel, place: Place) -> dict[int, float]:
        """Perplexity by length. Every rank makes equally many forward passes and gets the same result."""
        # Summed NLL and scored tokens of each length; fp64, since fp32 would lose digits over a million terms.
        sums = torch.zeros(len(self.lengths), 2, dtype=torch.float64)
        num_chunks = math.ceil(self.lengths[-1] / CHUNK)
        for total, length in zip(sums, self.lengths, strict=True):
            for row, weight in deal(self.rows[length], place):
                for logits, labels, _ in predictions(model, collate([row]), place.device, num_chunks):
                    nll = F.cross_entropy(logits, labels, reduction="none").double().sum()
                    total += weight * torch.tensor([nll.item(), len(labels)], dtype=torch.float64)
                place.on_forward()
        means = [nll / count for nll, count in sum_over_ranks(sums, place).tolist()]
        return {length: float(np.exp(mean)) for length, mean in zip(self.lengths, means, strict=True)}


def window_rows(stream: np.ndarray, length: int, row_tokens: int) -> list[Row]:
    """Non-overlapping windows of ``length`` tokens, as many in a row as fit into ``row_tokens``."""
    windows = [stream[start : start + length] for start in range(0, len(stream) - 1, length)]
    fit = row_tokens // length
    return [_row(windows[start : start + fit]) for start in range(0, len(windows), fit)]


def _row(windows: list[np.ndarray]) -> Row:
    labels = [np.concatenate([[IGNORE], window[1:]]) for window in windows]
    return Row(np.concatenate(windows), np.concatenate(labels), [len(w) for w in windows], [""] * len(windows))
