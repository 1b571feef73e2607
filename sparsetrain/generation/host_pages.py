"""Pages of keys and values in host memory, and the order of the copies between them and a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

SEGMENT = 16
"""Pages of a row that get their room at once."""


class HostPages:
    """Whole pages, page ``b`` of a row in place ``b``; room is made as texts grow. Pinned where the device is CUDA.

    Every copy is queued in the current stream and waits for nothing on the host.

    Args:
        pages: a device's pages of keys ``[pages, Hkv, block, D]``, of which these are others.
        rows: rows of the batch.
    """

    def __init__(self, pages: Tensor, rows: int) -> None:
        self.rows = rows
        self.written = [0] * rows
        """Pages of each row that have been written at least once."""
        self._page, self._dtype, self._device = pages.shape[1:], pages.dtype, pages.device
        self._segments: list[Tensor] = []  # [keys and values, rows, SEGMENT, Hkv, block, D]

    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(segment.nbytes for segment in self._segments)

    def fits(self, pages: Tensor, rows: int) -> bool:
        """Whether another text with such ``pages`` ``[pages, Hkv, block, D]`` on the device, of so many rows, can use
        the room."""
        same = (pages.shape[1:], pages.dtype, pages.device) == (self._page, self._dtype, self._device)
        return same and rows == self.rows

    def write(self, row: int, first: int, key: Tensor, value: Tensor) -> None:
        """Take pages of a row.

        Args:
            row: of the batch.
            first: number of the first page.
            key, value: ``[Hkv, pages * block, D]`` on the device.
        """
        heads, block, width = self._page
        for which, tensor in enumerate((key, value)):
            whole = tensor.reshape(heads, -1, block, width).transpose(0, 1)
            for start, part in self._parts(first, first + len(whole)):
                part[which, row].copy_(whole[start - first : start - first + part.shape[2]], non_blocking=True)
            self.written[row] = max(self.written[row], first + len(whole))

    def read(self, row: int, page: int, key: Tensor, value: Tensor) -> None:
        """Copy a page of a row to the device, into ``key`` and ``value``, ``[Hkv, block, D]``."""
        for which, tensor in enumerate((key, value)):
            tensor.copy_(self._segments[page // SEGMENT][which, row, page % SEGMENT], non_blocking=True)

    def gather(self, rows: Sequence[int], pages: int) -> tuple[Tensor, Tensor]:
        """The first ``pages`` pages of rows on the device, ``[rows, Hkv, pages * block, D]`` each."""
        heads, block, width = self._page
        shape = (len(rows), pages, heads, block, width)
        both = [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2)]
        for which, tensor in enumerate(both):
            for place, row in enumerate(rows):
                for start, part in self._parts(0, pages):
                    tensor[place, start : start + part.shape[2]].copy_(part[which, row], non_blocking=True)
        key, value = (tensor.transpose(1, 2).flatten(2, 3) for tensor in both)
        return key, value

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order. No copy of a page may be under way."""
        if list(rows) == list(range(self.rows)):
            return
        self.rows, self.written = len(rows), [self.written[row] for row in rows]
        old, self._segments = self._segments, []
        for segment in old:
            self._make_room()
            torch.index_select(segment, 1, torch.tensor(rows), out=self._segments[-1])

    def _parts(self, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """The room of pages ``first`` to ``end``, one segment at a time, each with its first page."""
        while end > len(self._segments) * SEGMENT:
            self._make_room()
        while first < end:
            inside = first % SEGMENT
            count = min(end - first, SEGMENT - inside)
            yield first, self._segments[first // SEGMENT][:, :, inside : inside + count]
            first += count

    def _make_room(self) -> None:
        shape, pinned = (2, self.rows, SEGMENT, *self._page), self._device.type == "cuda"
        self._segments.append(torch.zeros(shape, dtype=self._dtype, pin_memory=pinned))


class Copies:
    """Copies on a stream of their own beside the work of a CUDA device; on a CPU each is done where it is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device) if device.type == "cuda" else None
        self._done = torch.cuda.Event() if self._stream is not None else None

    @contextmanager
    def beside(self, *read: Tensor) -> Iterator[None]:
        """Within it, copies that begin when what the device has been given so far is done.

        Args:
            read: tensors ``[...]`` that they read or write and that may be freed before.
        """
        if self._stream is None or self._done is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in read:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
            self._done.record(self._stream)

    def arrive(self, *made: Tensor) -> None:
        """What the device is given from now on begins when the copies are done. The host waits for nothing.

        Args:
            made: tensors ``[...]`` that were made beside, and are used from now on.
        """
        if self._done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)
            for tensor in made:
                tensor.record_stream(stream)

    def finish(self) -> None:
        """Wait on the host until the copies are done."""
        if self._done is not None:
            self._done.synchronize()


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
