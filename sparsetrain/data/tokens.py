"""Held-out text as one sequence of tokens, for perplexity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsetrain.data.encoding import end_of_text, opening
from sparsetrain.data.memory import memory_explained
from sparsetrain.data.sources import Reader, open_source, rows_of
from sparsetrain.data.values import FIX, MalformedRow
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import PreTrainedTokenizerBase

    from sparsetrain.source_section import DataSource


@dataclass(frozen=True)
class HeldOut:
    """The first tokens of a source: its documents in order, each ended by EOS, without BOS."""

    input_ids: np.ndarray
    """int64 ``[n]``."""
    targets: np.ndarray
    """bool ``[n]``: the tokens to score. Of text all; of prompt + completion, chats and rows with labels those that
    training has a loss on."""
    starts: np.ndarray
    """int64 ``[documents]``: the first token of each document."""

    @property
    def documents(self) -> list[tuple[int, int]]:
        """The first token of each document, and that of the next."""
        starts = self.starts.tolist()
        return list(zip(starts, [*starts[1:], len(self.input_ids)], strict=True))

    @property
    def digest(self) -> str:
        """Equal for equal tokens, targets and documents."""
        parts = (np.ascontiguousarray(part).tobytes() for part in (self.input_ids, self.targets, self.starts))
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


def held_out_tokens(source: DataSource, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> HeldOut:
    """The first ``num_tokens`` tokens of a source. Rows are read only as far as they are needed.

    Raises:
        DataError: the source is synthetic, missing, malformed or too short, or has no token to score.
    """
    if source.path is None:
        raise DataError(f"data source {source.label!r}: perplexity is measured on text, not on a synthetic task")
    opened = open_source(source, tokenizer, streaming=source.streaming)
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    total = 0
    for index, raw in enumerate(rows_of(source, opened.open())):
        try:
            with memory_explained(source.label):
                document, scored = _document(opened.reader, raw, tokenizer)
        except MalformedRow as problem:
            place = opened.reader.place(raw, index)
            raise DataError(f"data source {source.label!r}: {place}: {problem}. {FIX}") from problem
        ids.append(document)
        targets.append(scored)
        total += len(document)
        if total >= num_tokens:
            break
    else:
        raise DataError(
            f"data source {source.label!r} has only {total:,} tokens with this tokenizer, and {num_tokens:,} are asked "
            "for; ask for fewer or name a longer source"
        )
    lengths = [len(document) for document in ids if len(document)]
    read = HeldOut(
        np.concatenate(ids)[:num_tokens].astype(np.int64),
        np.concatenate(targets)[:num_tokens],
        np.cumsum([0, *lengths[:-1]], dtype=np.int64),
    )
    if not read.targets[1:].any():
        raise DataError(
            f"data source {source.label!r}: none of the first {num_tokens:,} tokens has a label, so there is "
            "nothing to score; ask for more tokens, or read the rows as text (form: text)"
        )
    return read


def _document(
    reader: Reader, raw: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """A document without BOS and with EOS, and which of its tokens are scored; both may be empty."""
    tokens, spans = reader.tokens(raw, tokenizer)
    if reader.form.kind == "text":  # the first token too: another document stands before it
        spans = [(0, len(tokens))]
    scored = np.zeros(len(tokens), dtype=bool)
    for first, last in spans:
        scored[first:last] = True
    start, eos = opening(tokenizer), end_of_text(tokenizer)
    if tokens[: len(start)].tolist() == start:
        tokens, scored = tokens[len(start) :], scored[len(start) :]
    if len(tokens) and tokens[-1] != eos:
        # A template that ends a chat otherwise leaves no loss on EOS.
        ends = reader.form.kind in ("text", "tokens") and bool(scored[-1])
        tokens, scored = np.append(tokens, eos), np.append(scored, ends)
    return tokens, scored
