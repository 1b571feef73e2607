"""Tokens that SparseK takes back: the slots as they were before a round, and the calls that were read since.

A token that was evicted cannot come back, so a round (the draft of assisted generation, say) begins with a copy of the
slots. To take back its last tokens is to restore the copy and to read the others again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from sparsetrain.methods.sparsek.state import Slots

LONGEST = 128
"""Tokens of a round: a longer one begins anew, and its first tokens stay."""


@dataclass(frozen=True)
class Tokens:
    """The inputs of one call: ``query``, ``key`` and ``value`` ``[B, heads, n, D]``, scores and gain ``[B, Hs, n]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    linear: Tensor | None
    gain: Tensor | None

    @property
    def count(self) -> int:
        """``n``."""
        return self.query.shape[2]

    def part(self, tokens: slice) -> Tokens:
        """Some of the tokens."""
        return Tokens(*(None if each is None else each[:, :, tokens] for each in vars(self).values()))  # type: ignore[arg-type]

    def of_rows(self, rows: list[int] | slice) -> Tokens:
        """Those of some rows."""
        return Tokens(*(None if each is None else each[rows] for each in vars(self).values()))  # type: ignore[arg-type]

    def one_by_one(self) -> list[Tokens]:
        """Each token as a call of its own."""
        return [self.part(slice(token, token + 1)) for token in range(self.count)]

    def copy(self) -> Tokens:
        """The same in tensors of its own."""
        return Tokens(*(None if each is None else each.detach().clone() for each in vars(self).values()))  # type: ignore[arg-type]


@dataclass
class Round:
    """The tokens read since a copy of the slots was made."""

    layer: nn.Module
    """Its reader."""
    before: Slots
    """The slots then."""
    calls: list[Tokens] = field(default_factory=list)
    """The calls since, in order."""

    @property
    def tokens(self) -> int:
        """Tokens of a row that were read."""
        return sum(call.count for call in self.calls)

    def first(self, count: int) -> list[Tokens]:
        """The first ``count`` tokens, one by one."""
        return [token for call in self.calls for token in call.one_by_one()][:count]

    def nbytes(self) -> int:
        """Bytes of the tensors it holds."""
        held = [*vars(self.before).values(), *(each for call in self.calls for each in vars(call).values())]
        return sum(each.nbytes for each in held if each is not None)
