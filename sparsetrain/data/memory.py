"""Explain out-of-memory errors while data is read, where the model's settings would not help."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from sparsetrain.errors import DataMemoryError, first_line

# Of datasets, where the system has killed a process that tokenised.
_DIED = "abruptly died"


@contextmanager
def memory_explained(label: str) -> Iterator[None]:
    """Name the data source for which memory ran out.

    Raises:
        DataMemoryError: an allocation failed, in this process or in one that tokenises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _DIED not in str(error):
            raise
        raise out_of_memory(label, error) from error


def out_of_memory(label: str, error: BaseException) -> DataMemoryError:
    """The error for a data source that does not fit into memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return DataMemoryError(
        f"data source {label!r}: memory ran out while it was read ({first_line(error).rstrip('.')}; the peak of this "
        f"process was {peak:,.1f} GiB). What helps: data.num_workers: 1 (each process holds 64 rows at once), "
        "streaming: true for the source (a row at a time), and shorter documents, if some take hundreds of megabytes"
    )
