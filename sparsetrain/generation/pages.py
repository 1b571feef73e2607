"""The memory of static patterns and of full attention: pages of keys and values, and which page is where.

The pages of a batch are ``[B * slots, Hkv, block, D]``. Row ``r`` finds its token at position ``p`` in page
``table[r, p // block]``; padding is not kept, so positions count from a row's first token. Tables are made on the host
(``page_table.py``). A step of decoding writes one token and reads the listed pages: it copies nothing else and reads
nothing on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sparsetrain_kernels.block_decode import block_pattern_decode, prepare_block_decode
from sparsetrain_kernels.block_decode.inputs import MAX_ROWS
from sparsetrain_kernels.key_mirror import append_tokens
from torch import Tensor, nn

from sparsetrain.errors import ModelError
from sparsetrain.generation.page_table import NOT_KEPT, PageTable, page_table, still_read
from sparsetrain.generation.rows import PackedRows
from sparsetrain.methods.memory import Memory, addresses, alike
from sparsetrain.patterns import Pattern

Attend = Callable[..., Tensor]
"""``(layer, query, key, value, **options)``, as :meth:`~sparsetrain.methods.base.Method.attend`."""

ROLLBACK = 64
"""Tokens that can be taken back in any case, where nothing else is said."""


class PagedMemory(Memory):
    """Keys and values in pages.

    Args:
        pattern: the blocks that a block of queries reads; pages are its blocks.
        attend: attention of many rows, over keys without gaps.
        window: tokens that a row sees at most, its own included; None means all in the listed blocks.
        decodes: :func:`~sparsetrain_kernels.block_decode.block_pattern_decode` with this pattern and window is the same
            as ``attend``. Otherwise every step calls ``attend`` over all pages.
        max_length: tokens of a row at most, its padding included: the horizon. What no token after the prompt reads is
            then not kept, and all room is made at once. None means that rows grow without an end.
        rollback: tokens that can be taken back in any case.
        budget: tokens of a row that there is room for at most, where there is a horizon; None means as many as are
            needed.
    """

    def __init__(
        self,
        pattern: Pattern,
        attend: Attend,
        *,
        window: int | None = None,
        decodes: bool = True,
        max_length: int | None = None,
        rollback: int = ROLLBACK,
        budget: int | None = None,
    ) -> None:
        self.pattern, self.window, self.decodes, self.max_length = pattern, window, decodes, max_length
        self.static = decodes and max_length is not None
        self._budget = budget
        self._attend = attend
        self._slack = -(-rollback // pattern.block)  # blocks that can be taken back
        self._steps = min(MAX_ROWS, pattern.block, rollback + 1)  # most tokens of a call that the decode kernel takes
        self.keys: Tensor | None = None
        """``[B * slots, Hkv, block, D]``, as :attr:`values`; None before the first tokens."""
        self.values: Tensor | None = None
        self.beside: dict[str, Tensor] = {}
        """Further tensors by page, ``[B * slots, ...]``."""
        self.table: Tensor | None = None
        """Page of each block of a row, int32 ``[B, blocks]``; negative where none is kept."""
        self.lengths: Tensor | None = None
        """Tokens that each row has read, int32 ``[B]``."""
        self.tables: list[PageTable] = []
        """The same as :attr:`table`, on the host and by slots of a row."""
        self._starts: list[int] = []  # padding of each row, where there is a horizon
        self._highest: list[int] = []  # to where each row had been written when tokens were taken back
        self.reset()

    paged = True

    @property
    def rows(self) -> int:
        """See :attr:`Memory.rows`."""
        return len(self.tables)

    @property
    def started(self) -> bool:
        """See :attr:`Memory.started`."""
        return self._started

    @property
    def slots(self) -> int:
        """Pages of a row."""
        return 0 if self.keys is None else self.keys.shape[0] // self.rows

    def nbytes(self) -> int:
        """See :meth:`Memory.nbytes`."""
        held = (self.keys, self.values, self.table, self.lengths, *self.beside.values())
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def fixed(self) -> tuple[Any, ...]:
        """See :meth:`Memory.fixed`."""
        held = (self.keys, self.values, self.table, self.lengths, *self.beside.values())
        return addresses(held)

    def check_prompts(self, lengths: Sequence[int]) -> None:
        """See :meth:`Memory.check_prompts`."""
        if self._budget is not None:
            before, self._starts = self._starts, [max(lengths) - length for length in lengths]
            try:
                self._plan(lengths)
            finally:
                self._starts = before

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, starts: list[int] | None, **options: Any
    ) -> Tensor:
        """See :meth:`Memory.attend`."""
        if starts is not None and not any(starts):
            starts = None
        if self.decodes and self._started and starts is None and query.shape[2] <= self._steps:
            self._append(key, value)
            keys, values, table, lengths = self._tensors()
            return block_pattern_decode(
                query,
                keys,
                values,
                self.pattern,
                lengths=lengths,
                block_table=table,
                max_length=self.max_length,
                window=self.window,
                **options,
            )
        rows, tokens = query.shape[0], query.shape[2]
        padding = starts or [0] * rows
        before = self._lengths() if self.longest else [0] * rows
        after = [length + max(tokens - start, 0) for start, length in zip(padding, before, strict=True)]
        check_room(max(after), self.max_length)
        if any(before):
            out = self._attend_behind(layer, query, key, value, padding, before, options)
        elif starts is None:
            out = self._attend(layer, query, key, value, cu_seqlens=None, q_start=None, **options)
        elif any(after):
            packed = PackedRows(starts, tokens, query.device)
            tensors, options = (packed.pack(tensor) for tensor in (query, key, value)), _each(options, packed.pack)
            out = packed.unpack(self._attend(layer, *tensors, cu_seqlens=packed.cu_seqlens, q_start=None, **options))
        else:
            out = torch.zeros_like(query)
        self._store(key.detach(), value.detach(), padding, before, after)
        return out

    def rollback(self, tokens: int) -> None:
        """See :meth:`Memory.rollback`.

        Raises:
            ModelError: a page that is needed again has been written over.
        """
        if tokens == 0 or self.lengths is None:
            return
        self._highest, after = self.check_rollback(tokens)
        self.lengths.sub_(tokens).clamp_min_(0)
        self.longest, self._started = max(after), min(after) > 0

    def check_rollback(self, tokens: int) -> tuple[list[int], list[int]]:
        """Whether tokens can be taken back: to where each row has been written by then, and the tokens it will have.

        Raises:
            ModelError: a page that is needed again has been written over.
        """
        lengths = self._lengths()
        after = [max(length - tokens, 0) for length in lengths]
        highest = [max(pair) for pair in zip(self._highest, lengths, strict=True)]
        for row, (table, length) in enumerate(zip(self.tables, after, strict=True)):
            owned, block = table.owned(self._blocks(highest[row])), length // self.pattern.block
            for page in range(self._blocks(length)):
                if not owned[page] and still_read(self.pattern, page, block, self._horizon(row)):
                    raise ModelError(
                        f"{tokens} tokens cannot be taken back: the pages they need again have been written over; take "
                        f"back at most {self._slack * self.pattern.block} (draft fewer tokens at a time)"
                        + (", or make the SparseCache with a larger rollback" if self.max_length else "")
                    )
        return highest, after

    def begin_round(self) -> None:
        """Nothing: the last tokens can always be taken back."""

    def offload(self) -> None:
        """Raises :class:`ModelError`: pages stay where the layer is."""
        raise ModelError("pages stay where the layer is; generate without an offloaded cache")

    def reset(self) -> None:
        """See :meth:`Memory.reset`. Room for another text of the same batch stays."""
        self.longest, self._started, self._highest = 0, False, [0] * self.rows
        self._starts = [0] * self.rows
        if self.lengths is not None:
            self.lengths.zero_()

    def select_rows(self, rows: Tensor) -> None:
        """See :meth:`Memory.select_rows`. Where the number of rows stays, the tensors stay too."""
        if self.keys is None:
            return
        keys, values, _, lengths = self._tensors()
        old, slots, selected = self.rows, self.slots, rows.to(keys.device)
        same = len(rows) == old

        def select(tensor: Tensor) -> Tensor:
            chosen = tensor.index_select(0, selected)
            return tensor.copy_(chosen) if same else chosen

        def select_pages(tensor: Tensor) -> Tensor:
            return select(tensor.unflatten(0, (old, slots))).flatten(0, 1)

        self.keys, self.values = select_pages(keys), select_pages(values)
        self.beside = {name: select_pages(tensor) for name, tensor in self.beside.items()}
        self.lengths = select(lengths)
        # Where all rows are alike, as without a horizon, nothing is read from the device.
        alike = len({*zip(self.tables, self._highest, self._starts, strict=True)}) == 1
        order = [0] * len(rows) if alike else rows.tolist()
        self.tables = [self.tables[row] for row in order]
        self._highest = [self._highest[row] for row in order]
        self._starts = [self._starts[row] for row in order]
        if not (same and alike):
            self._write_table()
        if not same:
            self._stay()

    # --- one token a row -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _append(self, key: Tensor, value: Tensor) -> None:
        """Write the tokens of a step, ``[B, Hkv, n, D]``, behind those of each row."""
        tokens = key.shape[2]
        # A compiled step of a growing memory looks at the host's count too, and is compiled again where it must be.
        if not (self.static and torch.compiler.is_compiling()):
            check_room(self.longest + tokens, self.max_length)
            self._make_room(self.longest + tokens)
            self.longest += tokens
        _, _, table, lengths = self._tensors()
        lengths.add_(tokens)
        self._append_tokens(key, value, table)

    def _append_tokens(self, key: Tensor, value: Tensor, table: Tensor) -> None:
        """Write the newest tokens, which the lengths count already, to the pages of ``table``."""
        keys, values, _, lengths = self._tensors()
        append_tokens(key, value, keys, values, lengths=lengths, block_table=table)

    # --- many tokens a row ---------------------------------------------------------------------------------------

    def _attend_behind(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        options: dict[str, Any],
    ) -> Tensor:
        """Attention of new tokens to one another and to the pages, gathered: rows that are alike in one call."""
        out = torch.zeros_like(query)
        for (start, length), rows in alike(starts, lengths).items():
            if start < query.shape[2]:
                past = self._gather(rows, length)
                q, k, v = (tensor[rows][:, :, start:] for tensor in (query, key, value))
                k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
                own = _each(options, lambda tensor: tensor[rows][:, :, start:])  # noqa: B023 (called at once)
                out[rows, :, start:] = self._attend(layer, q, k, v, cu_seqlens=None, q_start=length, **own)
        return out

    def _gather(self, rows: list[int] | slice, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values of rows, ``[rows, Hkv, length, D]``, zeros where no page is kept."""
        *held, table, _ = self._tensors()
        pages, device = self._blocks(length), table.device
        which = list(range(self.rows))[rows] if isinstance(rows, slice) else rows
        owned = [self.tables[row].owned(self._blocks(max(length, self._highest[row])))[:pages] for row in which]
        index = table[rows, :pages].clamp_min(0).long()
        gathered = [tensor[index] for tensor in held]
        if not all(map(all, owned)):
            gone = ~torch.tensor(owned, device=device).reshape(len(which), pages, 1, 1, 1)
            gathered = [tensor.masked_fill_(gone, 0) for tensor in gathered]
        keys, values = (tensor.transpose(1, 2).flatten(2, 3)[:, :, :length] for tensor in gathered)
        return keys, values

    @torch.no_grad()
    def _store(
        self, key: Tensor, value: Tensor, starts: Sequence[int], before: Sequence[int], after: Sequence[int]
    ) -> None:
        """Write many new tokens to the pages that are kept. Rows were as long as ``before`` says, then as ``after``."""
        if self.longest == 0:
            self._allocate(key, starts, after)
        self._make_room(max(after))
        _, _, table, lengths = self._tensors()
        owned = [row.owned(self._blocks(end)) for row, end in zip(self.tables, after, strict=True)]
        if not all(map(all, owned)):
            table = table.where(torch.tensor(owned, device=table.device), NOT_KEPT)
        lengths.copy_(torch.tensor(after, dtype=torch.int32))
        self._append_tokens(key, value, table)
        self.longest, self._started = max(after), min(after) > 0

    # --- room ----------------------------------------------------------------------------------------------------

    def _allocate(self, key: Tensor, starts: Sequence[int], after: Sequence[int]) -> None:
        """Room for a new text, in the tensors of the one before where they fit."""
        batch = key.shape[0]
        self._starts, self._highest = [0] * batch, [0] * batch
        if self.max_length is None:
            self.tables = [page_table(self.pattern, self._roomy(max(after)), slack=self._slack)] * batch
        else:
            self._starts = list(starts)
            self.tables = self._plan(after)
        # No page is read again where the text ends with the prompt; the operations want one all the same.
        self._make_pages(key, max(1, *(table.needed for table in self.tables)))

    def _plan(self, after: Sequence[int]) -> list[PageTable]:
        """The tables of rows with a horizon, of which the first call wrote so many tokens.

        Raises:
            ModelError: they need more slots than there may be.
        """
        block, pages = self.pattern.block, self._blocks(self.max_length or 0)
        tables = [
            page_table(self.pattern, pages, prompt=end // block, horizon=self._horizon(row), slack=self._slack)
            for row, end in enumerate(after)
        ]
        self._check_budget(max(table.needed for table in tables), max(after))
        return tables

    def _check_budget(self, slots: int, prompt: int) -> None:
        needed = slots * self.pattern.block
        if self._budget is not None and needed > self._budget:
            raise ModelError(
                f"budget={self._budget}: behind a prompt of {prompt} tokens and up to max_length={self.max_length} the "
                f"pattern reads {needed} tokens of a row again ({slots} pages of {self.pattern.block}); set budget to "
                f"{needed} or more, or to auto, or lower max_length"
            )

    def _make_pages(self, key: Tensor, slots: int) -> None:
        """Room for ``slots`` pages a row of keys like these."""
        batch, heads, _, width = key.shape
        held = self.keys
        fits = held is not None and len(held) % batch == 0 and len(held) >= batch * slots
        fits = fits and (held.shape[1:], held.dtype, held.device) == (  # type: ignore[union-attr]
            (heads, self.pattern.block, width),
            key.dtype,
            key.device,
        )
        if fits and self.lengths is not None and len(self.lengths) == batch:
            self._write_table()
            return
        self.keys, self.values = (key.new_zeros(batch * slots, heads, self.pattern.block, width) for _ in range(2))
        self.beside = self._make_beside(key, batch * slots)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=key.device)
        self.table = None
        self._write_table()
        self._stay()

    def _make_room(self, length: int) -> None:
        """Let rows without a horizon grow to ``length`` tokens."""
        if self.max_length is not None or self._blocks(length) <= len(self.tables[0].slots):
            return
        keys, values, *_ = self._tensors()
        old = self.slots
        table = page_table(self.pattern, self._roomy(length), slack=self._slack)
        self.tables = [table] * self.rows
        if table.needed > old:

            def grow(tensor: Tensor) -> Tensor:
                part = tensor.unflatten(0, (self.rows, old))
                more = part.new_zeros(self.rows, table.needed - old, *part.shape[2:])
                return torch.cat([part, more], dim=1).flatten(0, 1)

            self.keys, self.values = grow(keys), grow(values)
            self.beside = {name: grow(tensor) for name, tensor in self.beside.items()}
        self._write_table()

    def _make_beside(self, key: Tensor, pages: int) -> dict[str, Tensor]:
        """:attr:`beside` for ``pages`` pages of keys like these."""
        return {}

    def _write_table(self) -> None:
        """The tables of the rows as one tensor, in the place of the one before where it fits."""
        slots = self.slots
        width = max(len(table.slots) for table in self.tables)
        rows = [[*table.slots, *[NOT_KEPT] * (width - len(table.slots))] for table in self.tables]
        local = torch.tensor(rows, dtype=torch.int32)
        pages = torch.where(local < 0, local, local + slots * torch.arange(len(rows), dtype=torch.int32)[:, None])
        if self.table is not None and self.table.shape == pages.shape:
            # Pinned, so that the host does not wait for the copy.
            self.table.copy_(pages.pin_memory() if self.table.is_cuda else pages, non_blocking=True)
        else:
            self.table = pages.to(self.keys.device)  # type: ignore[union-attr]

    def _stay(self) -> None:
        """Tell ``torch.compile`` that the tensors stay where they are; make here what a graph would keep to itself."""
        if self.static:
            keys, *_ = held = self._tensors()
            for tensor in (*held, *self.beside.values()):
                torch._dynamo.mark_static_address(tensor)
            if self.max_length is not None:
                heads, device = keys.shape[1], keys.device
                prepare_block_decode(self.pattern, max_length=self.max_length, num_kv_heads=heads, device=device)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, table and lengths, once there is room."""
        assert self.keys is not None
        assert self.values is not None
        assert self.table is not None
        assert self.lengths is not None
        return self.keys, self.values, self.table, self.lengths

    def _blocks(self, length: int) -> int:
        return -(-length // self.pattern.block)

    def _roomy(self, length: int) -> int:
        """Pages for ``length`` tokens and a quarter more, at least one."""
        needed = self._blocks(length)
        return needed + max(needed // 4, 1)

    def _horizon(self, row: int) -> int | None:
        """Blocks that a row has at most."""
        return None if self.max_length is None else self._blocks(self.max_length - self._starts[row])

    def _lengths(self) -> list[int]:
        return [] if self.lengths is None else self.lengths.tolist()


def check_room(length: int, max_length: int | None) -> None:
    """Refuse a text that grows beyond the horizon it was given.

    Raises:
        ModelError: names both.
    """
    if max_length is not None and length > max_length:
        raise ModelError(
            f"the text grows to {length} tokens, and this cache was made for max_length={max_length}: make a "
            "SparseCache with a larger max_length, or generate fewer tokens (max_new_tokens)"
        )


def _each(options: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The options with the method's extra inputs, ``[B, heads, N]``, changed as the queries are."""
    return {
        name: change(option) if isinstance(option, Tensor) and name != "sink_logits" else option
        for name, option in options.items()
    }
