"""The memory of a layer in generation: pages of keys and values, or the state of its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class Memory(ABC):
    """The memory of one layer and one cache. The rows of a batch may differ in length."""

    static: bool = False
    """Its tensors stay where they are and its steps change nothing on the host: a step can be compiled and captured."""

    fault: str | None = None
    """Why this memory cannot be used any more: what it should have read cannot be remembered."""

    most: int | None = None
    """Tokens of a row that it keeps at most, where that is known without a text."""

    longest: int = 0
    """Tokens of the longest row that the host has seen read, for memories that count them on the host."""

    part_of: int = 0
    """Tokens of a row of the text that the calls at present are parts of, which each reads as one call would read them
    all; 0 where a call is by itself."""

    chooses: bool = False
    """Steps read a choice of what it holds, which :meth:`observations` describes."""

    paged: bool = False
    """It holds keys and values of positions, and nothing that depends on more than these."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the batch; 0 before the first tokens."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Every row of the batch has read a token."""

    @abstractmethod
    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        starts: list[int] | None,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of the new tokens to the past and to one another; then they join the memory.

        Args:
            layer: the attention module that calls.
            query: ``[B, Hq, N, D]``.
            key, value: ``[B, Hkv, N, D]``, of the N new tokens only.
            starts: of each row, how many of the new tokens are padding on its left; None where none are.
            options: ``scale``, ``softcap``, ``sink_logits`` and the method's extra inputs, as in
                :meth:`~sparsetrain.methods.base.Method.attend`.

        Returns:
            ``[B, Hq, N, D]``, zeros on padding.
        """

    def observations(self) -> dict[str, float]:
        """Statistics of the steps that read a choice of what it holds, by name, such as ``kept``; none by default."""
        return {}

    @abstractmethod
    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens of every row (assisted generation takes back what was guessed wrong), so
        that what follows is as if they had never been read.

        Raises:
            ModelError: this memory cannot; the message says why and what to do instead.
        """

    @abstractmethod
    def begin_round(self) -> None:
        """Told before tokens are read of which some may be taken back (:meth:`rollback`)."""

    @abstractmethod
    def offload(self) -> None:
        """Move to host memory.

        Raises:
            ModelError: this memory cannot; the message says why and what to do instead.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, :attr:`fault` too."""

    @abstractmethod
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch (int64), in this order; a row may come more than once."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors it holds on the layer's device."""

    def fixed(self) -> tuple[Any, ...]:
        """What a captured step keeps of the moment when it was captured: addresses of tensors, and numbers that are in
        no tensor. It can be replayed as long as this stays equal."""
        return ()

    def prepare(self, tokens: int) -> None:  # noqa: B027 (most memories need not know)
        """Told on the host before a pass of so many tokens a row, be it compiled or not."""

    def check_prompts(self, lengths: Sequence[int]) -> None:  # noqa: B027 (most memories have no budget)
        """Refuse a batch of prompts, of so many tokens each, for which the budget is too small.

        Raises:
            ModelError: names the number that is needed.
        """

    def host_nbytes(self) -> int:
        """Bytes that it holds in host memory beside them."""
        return 0


def addresses(tensors: Iterable[torch.Tensor | None]) -> tuple[int, ...]:
    """Where tensors, of any shape ``[...]``, are; 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def alike(starts: Sequence[int], lengths: Sequence[int]) -> dict[tuple[int, int], list[int] | slice]:
    """The rows of a batch by their padding and by how many tokens they have read; a slice where all are alike."""
    pairs = list(zip(starts, lengths, strict=True))
    if len(set(pairs)) == 1:
        return {pairs[0]: slice(None)}
    return {pair: [row for row, other in enumerate(pairs) if other == pair] for pair in dict.fromkeys(pairs)}
