"""What the documents of a source are, as a short text that does not depend on where they lie."""

from __future__ import annotations

import hashlib
import os

import datasets
import numpy as np

READ_WHOLE = 1 << 28
"""Tokens up to which every document is read, in about a second a GB. Of more, documents spread evenly over all; the
lengths of all documents count in any case."""
AT_ONCE = 1000
"""Documents read at a time."""
SAMPLE = 1 << 16
"""Bytes read at the beginning, in the middle and at the end of a file."""


def content_of(rows: datasets.Dataset, usable: np.ndarray, lengths: np.ndarray) -> str:
    """A hash of the tokens and targets of documents, in their order.

    Args:
        rows: with the columns ``input_ids`` and ``targets``.
        usable: the numbers of those that count.
        lengths: tokens of each of these.
    """
    found = hashlib.blake2b(np.ascontiguousarray(lengths, dtype=np.int64).tobytes(), digest_size=8)
    chosen = usable[:: -(-int(lengths.sum()) // READ_WHOLE)]
    tables = rows.with_format("arrow")
    for start in range(0, len(chosen), AT_ONCE):
        table = tables[chosen[start : start + AT_ONCE]]
        for name in ("input_ids", "targets"):
            # How the table is cut into chunks does not count.
            chunks = table[name].chunks
            found.update(b"".join(np.diff(chunk.offsets).astype(np.int64).tobytes() for chunk in chunks))
            found.update(b"".join(np.asarray(chunk.flatten()).astype(np.int32).tobytes() for chunk in chunks))
    return found.hexdigest()


def content_of_files(files: list[str]) -> str:
    """A hash of the sizes of files and of a sample of each, in their order; a stream cannot be read to its end."""
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = os.stat(file).st_size
        found.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            for place in sorted({0, max(0, size - SAMPLE) // 2, max(0, size - SAMPLE)}):
                stream.seek(place)
                found.update(stream.read(SAMPLE))
    return found.hexdigest()
