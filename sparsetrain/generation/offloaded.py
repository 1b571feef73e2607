"""The memory of block patterns whose keys stay in host memory: the device holds what is read now and next.

The host holds every whole block of a text. A block pattern is known, so a block's pages are brought while the block
before it is being written: a step waits for none of them. After a jump (a prompt, tokens that were taken back) the
pages that are lacking are brought at once. So room on the device depends on the pattern alone, and any number of tokens
can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.errors import ModelError
from sparsetrain.generation.host_pages import Copies, HostPages
from sparsetrain.generation.page_table import NOT_KEPT, PageTable, most_pages_read, pages_read
from sparsetrain.generation.pages import ROLLBACK, Attend, PagedMemory, check_room
from sparsetrain.patterns import Pattern


class OffloadedMemory(PagedMemory):
    """Keys and values in pages, most of them on the host. ``tables`` says what the device holds, and changes.

    Args:
        pattern, attend: as in :class:`~sparsetrain.generation.pages.PagedMemory`.
        max_length: tokens of a row at most, its padding included.
        budget: tokens of a row on the device at most; None means as many as are needed.
    """

    def __init__(self, pattern: Pattern, attend: Attend, *, max_length: int, budget: int | None = None) -> None:
        self._ends: list[int] = []  # tokens of each row
        self._whole: list[int] = []  # pages of each row that the host has as they are
        self._blocks_now: list[tuple[int, int]] = []  # first and last block of the step that the tables are for
        # A compiled step runs nothing here but what it says of itself: that it has been.
        self._ready, self._ran, self._coming = False, False, 0
        self.prepared_between = False
        """Whoever captures a step calls :meth:`prepare` before each replay, and :meth:`has_run` after it."""
        self.host: HostPages | None = None
        """What lies in host memory; None before the first tokens."""
        self._copies: Copies | None = None
        super().__init__(pattern, attend, max_length=max_length, rollback=ROLLBACK, budget=budget)

    def host_nbytes(self) -> int:
        """See :meth:`Memory.host_nbytes`."""
        return 0 if self.host is None else self.host.nbytes()

    def reset(self) -> None:
        """See :meth:`Memory.reset`. Room for another text of the same batch stays."""
        super().reset()
        self._forget()

    def rollback(self, tokens: int) -> None:
        """See :meth:`Memory.rollback`. Any number of tokens: the host has what they need again."""
        if tokens == 0 or self.lengths is None:
            return
        self._catch_up()
        self.lengths.sub_(tokens).clamp_min_(0)
        self._ends = [max(end - tokens, 0) for end in self._ends]
        self._whole = [min(pair) for pair in zip(self._whole, self._full(), strict=True)]
        self.longest, self._started, self._ready = max(self._ends), min(self._ends) > 0, False

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`. Rows that change are copied on the host too, and waited for."""
        if self.host is None or self._copies is None:
            return
        self._catch_up()
        self._copies.finish()
        super().select_rows(rows)
        order = rows.tolist()
        self.host.select_rows(order)
        self._ends, self._whole = ([each[row] for row in order] for each in (self._ends, self._whole))
        self._blocks_now, self._ready = [], False

    def prepare(self, tokens: int) -> None:
        """See :meth:`Memory.prepare`: brings what a step of so many tokens reads."""
        self._catch_up()
        if self._started and tokens <= self._steps:
            self._turn(tokens)
            self._ready, self._coming = True, tokens

    def has_run(self) -> None:
        """Told that a captured step has been replayed."""
        self._ready, self._ran = False, True

    def _catch_up(self) -> None:
        """Count the tokens of a compiled or captured step."""
        if self._ran:
            self._ran = False
            self._advance(self._coming)

    def _advance(self, tokens: int) -> None:
        self._ready, self._ends = False, [end + tokens for end in self._ends]
        self.longest = max(self._ends)

    # --- which pages are on the device -----------------------------------------------------------------------------

    @torch.compiler.disable  # pages of an offloaded cache move between steps
    def _turn(self, tokens: int) -> None:
        """Have on the device what the next ``tokens`` tokens of each row read, and bring what the next block does."""
        blocks = [(self._block(row, end), self._block(row, end + tokens - 1)) for row, end in enumerate(self._ends)]
        if blocks == self._blocks_now:
            return
        copies, _ = self._stores()
        copies.arrive()
        with copies.beside():
            self._save()
        awaited, ahead = [], []
        for row, (first, last) in enumerate(blocks):
            now = pages_read(self.pattern, first) | pages_read(self.pattern, last)
            # A step that reaches into the next block has that block's pages among its own.
            later = self._block(row, (last + 1) * self.pattern.block) if first == last else last
            lacking = self._seat(row, now | pages_read(self.pattern, later))
            awaited += [(row, page) for page in lacking if page in now]
            ahead += [(row, page) for page in lacking if page not in now]
        if awaited:
            self._bring(awaited)
            copies.arrive()
        self._bring(ahead)
        self._write_table()
        self._blocks_now = blocks

    def _seat(self, row: int, wanted: frozenset[int]) -> list[int]:
        """Give each wanted page a slot, and those of others up. Returns the pages that had none."""
        slots = [slot if page in wanted else NOT_KEPT for page, slot in enumerate(self.tables[row].slots)]
        free = sorted(set(range(self.slots)) - set(slots))
        lacking = []
        for page in sorted(wanted):
            if slots[page] == NOT_KEPT:
                slots[page] = free.pop(0)
                lacking.append(page)
        self.tables[row] = PageTable(tuple(slots), self.slots)
        return lacking

    def _bring(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy pages, ``(row, page)``, to the slots that they have been given."""
        copies, host = self._stores()
        with copies.beside():
            for row, page in pages:
                # What has no token yet, or is being filled, is not on the host.
                if page * self.pattern.block < self._ends[row] and page < host.written[row]:
                    host.read(row, page, *self._held(row, page))

    def _save(self) -> None:
        """Copy pages to the host that have become whole since the last time."""
        _, host = self._stores()
        for row, full in enumerate(self._full()):
            for page in range(self._whole[row], full):
                host.write(row, page, *self._held(row, page))
            self._whole[row] = max(full, self._whole[row])

    # --- tokens ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _append(self, key: Tensor, value: Tensor) -> None:
        """See :meth:`PagedMemory._append`."""
        if torch.compiler.is_compiling():
            if not self._ready:
                raise ModelError(
                    "a compiled step has no way to bring pages from the host: let generate compile the steps, or call "
                    "cache.prepare(tokens) before each"
                )
            super()._append(key, value)
            self._ready, self._ran = False, True
            return
        if key.is_cuda and torch.cuda.is_current_stream_capturing():
            if not self.prepared_between:
                raise ModelError(
                    "a captured step would bring the same pages in every replay: write with sparsetrain.generate, "
                    "which brings pages between them"
                )
            super()._append(key, value)
            return
        tokens = key.shape[2]
        self._catch_up()
        check_room(self.longest + tokens, self.max_length)
        self._turn(tokens)
        *_, table, lengths = self._tensors()
        lengths.add_(tokens)
        self._append_tokens(key, value, table)
        self._advance(tokens)

    @torch.compiler.disable  # a prompt reads its past from the host
    def _gather(self, rows: list[int] | slice, length: int) -> tuple[Tensor, Tensor]:
        """See :meth:`PagedMemory._gather`: whole pages from the host, and the one that is being filled."""
        self._turn(1)
        copies, host = self._stores()
        which = list(range(self.rows))[rows] if isinstance(rows, slice) else rows
        pages, rest = divmod(length, self.pattern.block)
        with copies.beside():
            self._save()
            keys, values = host.gather(which, pages)
        copies.arrive(keys, values)
        if not rest:
            return keys, values
        begun = [self._held(row, pages) for row in which]
        last = (torch.stack(each)[:, :, :rest] for each in zip(*begun, strict=True))
        key, value = (torch.cat(pair, dim=2) for pair in zip((keys, values), last, strict=True))
        return key, value

    @torch.compiler.disable  # a prompt goes to the host
    @torch.no_grad()
    def _store(
        self, key: Tensor, value: Tensor, starts: Sequence[int], before: Sequence[int], after: Sequence[int]
    ) -> None:
        """See :meth:`PagedMemory._store`: whole pages go to the host, and back from there where a step reads them."""
        if self.longest == 0:
            self._allocate(key, starts, after)
        self._ready = False
        *_, lengths = self._tensors()
        if any(before):
            self._turn(1)
        lengths.copy_(torch.tensor(after, dtype=torch.int32))
        if any(before):
            self._append_tokens(key, value, self._tensors()[2])  # fills the pages that had been begun
        copies, host = self._stores()
        block = self.pattern.block
        with copies.beside(key, value):
            # Pages that had been begun are on the device, the others are among the new keys.
            for row, done in enumerate(before):
                self._ends[row] = min(-(-done // block) * block, after[row])
            self._save()
            self._ends = list(after)
            for row, (start, done, full) in enumerate(zip(starts, before, self._full(), strict=True)):
                first = self._whole[row]
                if first < full:
                    columns = slice(start + first * block - done, start + full * block - done)
                    host.write(row, first, key[row, :, columns], value[row, :, columns])
                    self._whole[row] = full
        self.longest, self._started = max(after), min(after) > 0
        self._turn(1)
        self._append_tokens(key, value, self._tensors()[2])  # fills the page that is begun now

    def _allocate(self, key: Tensor, starts: Sequence[int], after: Sequence[int]) -> None:
        """See :meth:`PagedMemory._allocate`."""
        super()._allocate(key, starts, after)
        held = self._tensors()[0]
        if self.host is None or not self.host.fits(held, self.rows):
            self.host, self._copies = HostPages(held, self.rows), Copies(key.device)
        self._forget()

    def _plan(self, after: Sequence[int]) -> list[PageTable]:
        """See :meth:`PagedMemory._plan`: slots for what two neighbouring blocks read, and nothing in them."""
        pages = self._blocks(self.max_length or 0)
        slots = most_pages_read(self.pattern, pages)
        self._check_budget(slots, max(after))
        return [PageTable((NOT_KEPT,) * pages, slots)] * len(after)

    def _forget(self) -> None:
        """No row holds a token."""
        self._ends, self._whole, self._blocks_now = [0] * self.rows, [0] * self.rows, []
        self._ready, self._ran = False, False
        self.tables = [PageTable((NOT_KEPT,) * len(table.slots), table.needed) for table in self.tables]

    def _stores(self) -> tuple[Copies, HostPages]:
        assert self._copies is not None
        assert self.host is not None
        return self._copies, self.host

    def _held(self, row: int, page: int) -> tuple[Tensor, Tensor]:
        """A page on the device, keys and values ``[Hkv, block, D]``."""
        keys, values, *_ = self._tensors()
        place = row * self.slots + self.tables[row].slots[page]
        return keys[place], values[place]

    def _block(self, row: int, position: int) -> int:
        """The block of a position; the last one of the row for positions behind it."""
        horizon = self._horizon(row)
        assert horizon is not None
        return min(position // self.pattern.block, horizon - 1)

    def _full(self) -> list[int]:
        """Whole pages of each row."""
        return [end // self.pattern.block for end in self._ends]

    def _lengths(self) -> list[int]:
        self._catch_up()
        return list(self._ends)
