"""The two exchanges of a sequence that ranks share: a part of the tokens of all heads, for all tokens of some heads.

Each is one all-to-all, and one more in backward. On the way in, everything that a token has for a rank (its queries,
keys, values and extra inputs such as scores, of any dtypes) is one record of bytes, so that one all-to-all moves it
all. Ranks hold consecutive tokens, so what a rank receives is a table of records in the order of the tokens: query, key
and value are strided views of it, whose rows kernels read where they are. Records and the fields in them are aligned as
TMA and 16-byte copies want them. On the way out, what attention returns is sent as it is.

Forward, each element is copied once: before the exchange on the way in, and behind the one on the way out. In backward
gradients of outputs are copied once, and those of queries, keys and values twice, because kernels give them in tensors
of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 32
"""Bytes: rows of 16 elements of 16 bits, which the kernels that gather keys want; TMA wants 16 bytes."""


def deal_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """All tokens of this rank's heads, for this rank's tokens of all heads.

    Args:
        tensors: ``[1, H, n, D]`` or ``[1, H, n]`` each, with its own ``H``, ``D`` and dtype. ``H`` is a multiple of the
            ranks, or divides them: then each head goes to several ranks, and its gradient is the sum of theirs.

    Returns:
        ``[1, max(1, H / ranks), N, D]``, or without ``D``: views of one buffer, in which rows are consecutive.
    """
    dealt = _Deal.apply(group, *(tensor if tensor.dim() == 4 else tensor.unsqueeze(-1) for tensor in tensors))
    return tuple(rows if tensor.dim() == 4 else rows.squeeze(-1) for rows, tensor in zip(dealt, tensors, strict=True))


def collect_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of all heads, ``[1, n, H, D]``, for all tokens of its heads, ``[1, N, H / ranks, D]``."""
    collected: Tensor = _Collect.apply(group, out)
    return collected


class _Field(NamedTuple):
    """A tensor's place in the records."""

    holders: int
    """Groups of heads. Each goes to ``copies`` ranks that follow one another."""
    copies: int
    own: int
    """Heads in a group."""
    width: int
    dtype: torch.dtype
    start: int
    """Bytes before it in a record."""

    @property
    def end(self) -> int:
        """Bytes of a record up to its end."""
        return self.start + self.own * self.width * self.dtype.itemsize

    def of_tokens(self, records: Tensor) -> Tensor:
        """A view ``[N, own, width]`` of records ``[ranks, n, bytes]`` that are ordered by token."""
        return records.flatten(0, 1)[:, self.start : self.end].view(self.dtype).unflatten(1, (self.own, self.width))

    def of_heads(self, records: Tensor) -> Tensor:
        """A view ``[n, holders, copies, own, width]`` of records ``[ranks, n, bytes]`` that are ordered by head."""
        return self.of_tokens(records).unflatten(0, (self.holders, self.copies, -1)).movedim(2, 0)


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.tokens = group, tensors[0].shape[2]
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.set_materialize_grads(False)
        fields, records = _lay_out(ctx.like, group, ctx.tokens, tensors[0].device)
        for field, tensor in zip(fields, tensors, strict=True):
            rows = tensor[0].transpose(0, 1).unflatten(1, (field.holders, 1, field.own))
            _copy(field.of_heads(records), rows)
        received = _exchange(records, group)
        dealt = tuple(field.of_tokens(received).transpose(0, 1)[None] for field in fields)
        needless = [rows for rows, needed in zip(dealt, ctx.needs_input_grad[1:], strict=True) if not needed]
        ctx.mark_non_differentiable(*needless)
        return dealt

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [index for index, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        device = next(grad.device for grad in grads if grad is not None)
        fields, records = _lay_out([ctx.like[index] for index in needed], ctx.group, ctx.tokens, device)
        for field, index in zip(fields, needed, strict=True):
            rows, grad = field.of_tokens(records), grads[index]
            if grad is None:
                rows.zero_()
            else:
                _copy(rows, grad[0].transpose(0, 1))
        received = _exchange(records, ctx.group)
        del records  # before as much is made again
        found: list[Tensor | None] = [None] * len(grads)
        for field, index in zip(fields, needed, strict=True):
            rows = field.of_heads(received)
            if field.copies == 1:
                # The query is laid out by tokens too.
                own = torch.empty(rows.shape, dtype=rows.dtype, device=device)
                _copy(own, rows)
            else:
                own = rows.sum(2)
            found[index] = own.flatten(1, -2).transpose(0, 1)[None]
        return None, *found


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, out: Tensor) -> Tensor:
        ctx.group = group
        received = _exchange(out[0].unflatten(0, (dist.get_world_size(group), -1)).contiguous(), group)
        by_token = received.transpose(0, 1)
        collected = torch.empty(by_token.shape, dtype=out.dtype, device=out.device)
        _copy(collected, by_token)
        return collected.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        by_head = grad[0].unflatten(1, (dist.get_world_size(ctx.group), -1)).transpose(0, 1)
        sent = torch.empty(by_head.shape, dtype=grad.dtype, device=grad.device)
        _copy(sent, by_head)
        return None, _exchange(sent, ctx.group).flatten(0, 1)[None]


def _lay_out(
    like: Sequence[tuple[torch.Size, torch.dtype]], group: dist.ProcessGroup, tokens: int, device: torch.device
) -> tuple[list[_Field], Tensor]:
    """The fields of tensors of these shapes ``[1, H, n, D]``, and uint8 records ``[ranks, n, bytes]`` for them."""
    ranks = dist.get_world_size(group)
    fields: list[_Field] = []
    for shape, dtype in like:
        holders = min(shape[1], ranks)
        start = _aligned(fields[-1].end) if fields else 0
        fields.append(_Field(holders, ranks // holders, shape[1] // holders, shape[3], dtype, start))
    return fields, torch.empty((ranks, tokens, _aligned(fields[-1].end)), dtype=torch.uint8, device=device)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _exchange(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all along the first dimension: slice ``i`` goes to rank ``i``; received slices are ordered by sender."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy strided rows, 8 bytes at a time if they allow it: single elements of 16 bits are copied slowly."""
    wide = 8 // target.dtype.itemsize
    if wide > 1 and _holds_words(target, wide) and _holds_words(source, wide):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def _holds_words(tensor: Tensor, wide: int) -> bool:
    numbers = (tensor.storage_offset(), tensor.shape[-1], *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(number % wide == 0 for number in numbers)
