"""A hash of a source's documents that does not depend on their location."""

from __future__ import annotations

import hashlib
import os

import datasets
import numpy as np

READ_WHOLE = 1 << 28
"""Up to this number of tokens all documents are hashed, in about a second per GB; beyond it, an evenly spaced sample.
The lengths of all documents are always included."""
AT_ONCE = 1000
"""Number of documents read at once."""
SAMPLE = 1 << 16
"""Number of bytes read at the beginning, in the middle and at the end of a file."""


def content_of(rows: datasets.Dataset, usable: np.ndarray, lengths: np.ndarray) -> str:
    """A hash of the tokens and targets of documents, in order.

    Args:
        rows: A dataset with the columns ``input_ids`` and ``targets``.
        usable: Indices of the documents to include, integers ``[n]``.
        lengths: Tokens of each of these, integers ``[n]``.
    """
    found = hashlib.blake2b(np.ascontiguousarray(lengths, dtype=np.int64).tobytes(), digest_size=8)
    chosen = usable[:: -(-int(lengths.sum()) // READ_WHOLE)]
    tables = rows.with_format("arrow")
    for start in range(0, len(chosen), AT_ONCE):
        table = tables[chosen[start : start + AT_ONCE]]
        for name in ("input_ids", "targets"):
            # The hash must not depend on the table's chunks.
            chunks = table[name].chunks
            found.update(b"".join(np.diff(chunk.offsets).astype(np.int64).tobytes() for chunk in chunks))
            found.update(b"".join(np.asarray(chunk.flatten()).astype(np.int32).tobytes() for chunk in chunks))
    return found.hexdigest()


def content_of_files(files: list[str]) -> str:
    """A hash of the sizes of files and of a sample of each, in order, for streams, which are not read completely."""
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = os.stat(file).st_size
        found.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            for place in sorted({0, max(0, size - SAMPLE) // 2, max(0, size - SAMPLE)}):
                stream.seek(place)
                found.update(stream.read(SAMPLE))
    return found.hexdigest()
