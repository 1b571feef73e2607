"""Held-out text as one sequence of tokens, for perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsetrain.data.encoding import end_of_text, opening
from sparsetrain.data.memory import memory_explained
from sparsetrain.data.sources import open_source, rows_of
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.source_section import DataSource


def token_stream(source: DataSource, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> np.ndarray:
    """The first ``num_tokens`` tokens of a source: its documents in order, each ended by EOS, without BOS.

    Rows are read only as far as they are needed.

    Returns:
        int64 ``[num_tokens]``.

    Raises:
        DataError: the source is synthetic, missing, malformed or too short.
    """
    if source.path is None:
        raise DataError(f"data source {source.label!r}: perplexity is measured on text, not on a synthetic task")
    opened = open_source(source, tokenizer, streaming=source.streaming)
    start, eos = opening(tokenizer), end_of_text(tokenizer)
    parts: list[np.ndarray] = []
    total = 0
    for index, raw in enumerate(rows_of(source, opened.open())):
        try:
            with memory_explained(source.label):
                document = opened.reader.tokens(raw, tokenizer).input_ids
        except MalformedRow as problem:
            raise DataError(f"data source {source.label!r}: {opened.reader.place(raw, index)}: {problem}") from problem
        if not len(document):
            continue
        if document[: len(start)].tolist() == start:
            document = document[len(start) :]
        if document[-1] != eos:
            document = np.append(document, eos)
        parts.append(document)
        total += len(document)
        if total >= num_tokens:
            return np.concatenate(parts)[:num_tokens].astype(np.int64)
    raise DataError(
        f"data source {source.label!r} has only {total:,} tokens with this tokenizer, and {num_tokens:,} are asked "
        "for; ask for fewer or name a longer source"
    )
