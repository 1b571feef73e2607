"""Build the stream of training rows from the recipe's ``data`` and ``sequence`` sections."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sparsetrain.data.mapped import MappedSource
from sparsetrain.data.memory import memory_explained
from sparsetrain.data.stream import DocumentSource, RowStream
from sparsetrain.data.streamed import StreamedSource
from sparsetrain.data.synthetic import SyntheticSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import DataSection, SequenceSection
    from sparsetrain.source_section import DataSource

logger = logging.getLogger(__name__)


def build_rows(
    data: DataSection,
    sequence: SequenceSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    pairs: bool = False,
) -> RowStream:
    """Open every source of the mixture (mapped ones are tokenised, or read from the cache) and pack them.

    Args:
        pairs: their rows are pairs of a preferred and a rejected answer, which become two neighbouring documents of a
            row, the preferred one first.

    Raises:
        DataError: A source is missing, empty, malformed (if the recipe says stop), lacks a column, or does not fit into
            memory.
    """
    sources: list[DocumentSource] = []
    for index, source in enumerate(data.sources):
        with memory_explained(source.label):
            sources.append(_source(source, data, sequence, tokenizer, seed, index, pairs))
    return RowStream(
        sources,
        [source.weight for source in data.sources],
        row_length=sequence.length,
        packing=sequence.packing,
        long_documents=data.long_documents,
        shuffle=any(source.shuffle and source.synthetic is None for source in data.sources),
        seed=seed,
    )


def _source(
    source: DataSource,
    data: DataSection,
    sequence: SequenceSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    index: int,
    pairs: bool,
) -> DocumentSource:
    if source.synthetic is not None:
        return SyntheticSource(source, tokenizer, sequence.length, seed, index)
    if source.streaming:
        return StreamedSource(source, data, tokenizer, sequence.length, pairs=pairs)
    mapped = MappedSource(source, data, tokenizer, sequence.length, seed, index, pairs=pairs)
    long = int((mapped.lengths > sequence.length).sum())
    if long and data.long_documents != "split":
        done = "dropped" if data.long_documents == "drop" else "truncated to one row"
        logger.warning(
            "data source %r: %d of %d %s are longer than sequence.length=%d and are %s (data.long_documents=%s)",
            mapped.label, long, len(mapped.lengths), "pairs" if pairs else "documents", sequence.length, done,
            data.long_documents,
        )  # fmt: skip
    return mapped
