"""Make the micro batches of one rank from the global stream of rows, prefetched one step ahead."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from sparsetrain.data.batch import Batch, Row, Step, collate
from sparsetrain.data.sequence_part import collate_part
from sparsetrain.data.stream import RowStream

if TYPE_CHECKING:
    from sparsetrain.recipe.batch import BatchShape


class StepLoader:
    """An endless iterator over the optimizer steps of one rank.

    Step ``s`` takes rows ``s * G`` to ``s * G + G - 1`` of the global stream, ``G = micro_batch * accumulation *
    ranks``. Every rank walks the same stream and reads its own rows: in accumulation step ``a``, rank ``r`` takes the
    ``micro_batch`` rows from ``(a * ranks + r) * micro_batch`` on. The global batch therefore depends on ``G`` alone.
    Where each sequence is shared by ``parallel`` ranks, such a group takes the place of one rank, and each of its
    members gets its part of the rows (:func:`~sparsetrain.data.sequence_part.collate_part`).

    A thread prepares the next step while the current one trains. ``rows`` belongs to that thread from here on: the
    state to save is ``Step.state``, and the state to resume from is loaded into ``rows`` before.

    Args:
        rows: The global stream.
        plan: Rows of a micro batch, accumulation steps, ranks.
        rank: This process, ``0`` to ``ranks * parallel - 1``; neighbours share a sequence.
    """

    def __init__(self, rows: RowStream, plan: BatchShape, rank: int) -> None:
        self._rows = rows
        self._plan = plan
        self._rank, self._part = divmod(rank, plan.parallel)
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._prefetch, name="sparsetrain-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> Step:
        """The next step.

        Raises:
            DataError: a row could not be read. Whatever stopped the thread is raised here, and again on every call.
            StopIteration: the loader was closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        while self._thread.is_alive():
            # An item may be waiting for room in the queue.
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _prefetch(self) -> None:
        while not self._closed.is_set():
            try:
                item: Step | BaseException = self._step()
            except BaseException as failure:
                item = failure
            self._ready.put(item)
            if isinstance(item, BaseException):
                return

    def _step(self) -> Step:
        plan = self._plan
        micro_batches: list[Batch] = []
        for _ in range(plan.accumulation):
            mine: list[Row] = []
            for rank in range(plan.ranks):
                for _ in range(plan.micro_batch):
                    if rank == self._rank:
                        mine.append(next(self._rows))
                    else:
                        self._rows.skip()
            whole = plan.parallel == 1
            micro_batches.append(collate(mine) if whole else collate_part(mine, self._part, plan.parallel))
        return Step(micro_batches, self._rows.state_dict())
