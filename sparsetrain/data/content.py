"""What the documents of a source are, as a short text that does not depend on where they lie."""

from __future__ import annotations

import hashlib

import datasets
import numpy as np

READ_WHOLE = 1 << 28
"""Tokens up to which every document is read, in about a second a GB. Of more, documents spread evenly over all; the
lengths of all documents count in any case."""
AT_ONCE = 1000
"""Documents read at a time."""


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
