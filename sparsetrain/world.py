"""The ranks of a run, and the position of this process among them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sparsetrain.errors import SparsetrainError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank, and the number of ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that logs, writes and draws."""
        return self.rank == 0

    def largest(self, value: float) -> float:
        """The maximum of a value over all ranks; a collective operation."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def on_main(self, act: Callable[[], T]) -> T:
        """Run ``act`` on rank 0 and return its result on every rank; a collective operation.

        Raises:
            SparsetrainError: ``act`` raised it; every rank does.
        """
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = act()
            except SparsetrainError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def rank_name(rank: int, host: str | None = None) -> str:
    """``rank 3 (host node-7)``; the host is this one by default. Its name need not resolve to an address."""
    return f"rank {rank} (host {socket.gethostname() if host is None else host})"
