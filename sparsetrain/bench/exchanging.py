"""The two exchanges of ranks that share a row, over the launcher's ranks: all-to-all, and between neighbours.

A rank begins with ``n`` tokens of a row, ``[heads, n, head_dim]``, as a layer's projections leave them. Timed is what
one layer of attention takes to have all it reads, and its result back in place, copies into one buffer included:

- **all-to-all**: what training does (:mod:`sparsetrain.modeling.head_exchange`): queries, keys and values in one buffer
  to the rank of their heads, the output back; backward the gradient of the output there, the others back.
- **neighbours**: keys and values of the ranks that the pattern's blocks are on; backward their gradients back, and the
  sum with the rank's own. Queries and outputs stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.text import Text
from torch import Tensor

from sparsetrain.bench.case import Case, Log, Pair
from sparsetrain.bench.measure import MIB, explain, peak
from sparsetrain.bench.table import Report, Row, column
from sparsetrain.errors import BenchError
from sparsetrain.modeling.head_exchange import collect_heads, deal_heads
from sparsetrain.patterns import PowerPattern
from sparsetrain.world import World

WARMUP = 2
"""Calls before those that are timed: NCCL connects the ranks in the first."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of a row."""

    query: Tensor
    """``[heads, n, head_dim]``; the output and both gradients have its shape."""
    key_value: Tensor
    """``[2, kv_heads, n, head_dim]``."""
    world: World
    pattern: PowerPattern
    group: Any = None

    @cached_property
    def chunks(self) -> list[dict[int, int]]:
        """For each rank, the tokens that it needs of the ranks before it: all of a rank's, or the sinks alone."""
        ranks, tokens, block = self.world.size, self.query.shape[1], self.pattern.block
        each = tokens // block
        needed: list[dict[int, int]] = []
        for rank in range(ranks):
            own = range(rank * each, (rank + 1) * each)
            blocks = {key for query in own for key in self.pattern.key_blocks(query)} - set(own)
            of_ranks: dict[int, set[int]] = {}
            for key in blocks:
                of_ranks.setdefault(key // each, set()).add(key % each)
            sinks = set(range(self.pattern.sinks))
            needed.append(
                {
                    other: len(sinks) * block if other == 0 and found <= sinks else tokens
                    for other, found in of_ranks.items()
                }
            )
        return needed


@dataclass(frozen=True)
class Exchange:
    """A way to exchange, forward and backward."""

    name: str
    forward: Callable[[Part], Any]
    backward: Callable[[Part, Any], Any]
    """From what ``forward`` returned."""
    received: Callable[[Part], int]
    """Bytes that this rank receives, forward; backward the whole of all ranks is the same again."""
    devices: tuple[str, ...] = ("cuda", "cpu")


def _all_to_all(part: Part) -> tuple[list[Tensor], list[Tensor]]:
    """As in training; returns what was exchanged and what it became."""
    query, *key_value = (each[None].detach().requires_grad_() for each in (part.query, *part.key_value))
    dealt = deal_heads((query, *key_value), part.group)
    attended = torch.empty_like(dealt[0].transpose(1, 2)).requires_grad_()  # what attention returns
    return [query, *key_value, attended], [*dealt, collect_heads(attended, part.group)]


def _all_to_all_back(part: Part, found: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, ...]:
    inputs, outputs = found
    gradients = [torch.empty_like(each) for each in outputs]
    return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def _all_to_all_bytes(part: Part) -> int:
    moved = 2 * part.query.nbytes + part.key_value.nbytes
    return moved * (part.world.size - 1) // part.world.size


def _send(part: Part, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
    operations = [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in incoming.items()]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def _neighbours(part: Part) -> dict[int, Tensor]:
    rank, held = part.world.rank, part.key_value
    mine = {other: needs[rank] for other, needs in enumerate(part.chunks) if rank in needs}
    outgoing = {other: held[:, :, :tokens].contiguous() for other, tokens in mine.items()}
    incoming = {other: torch.empty_like(held[:, :, :tokens]) for other, tokens in part.chunks[rank].items()}
    incoming = {other: tensor.contiguous() for other, tensor in incoming.items()}
    _send(part, outgoing, incoming)
    return incoming


def _neighbours_back(part: Part, found: dict[int, Tensor]) -> Tensor:
    """Gradients of the keys and values that were received go back, and are added to this rank's own."""
    rank, held = part.world.rank, part.key_value
    gradient = torch.empty_like(held)  # what attention gives for the rank's own
    mine = {other: needs[rank] for other, needs in enumerate(part.chunks) if rank in needs}
    incoming = {other: torch.empty_like(held[:, :, :tokens]).contiguous() for other, tokens in mine.items()}
    _send(part, found, incoming)
    for other, tokens in mine.items():
        gradient[:, :, :tokens] += incoming[other]
    return gradient


def _neighbours_bytes(part: Part) -> int:
    of_token = part.key_value[:, :, :1].nbytes
    return sum(part.chunks[part.world.rank].values()) * of_token


ALL_TO_ALL = Exchange("all-to-all", _all_to_all, _all_to_all_back, _all_to_all_bytes)
NEIGHBOURS = Exchange("neighbours", _neighbours, _neighbours_back, _neighbours_bytes)


@dataclass(kw_only=True)
class ExchangeRow(Row):
    """One exchange at one length; the slowest and the busiest rank."""

    forward_ms: float | None = column("forward ms")
    backward_ms: float | None = column("backward ms")
    received_mib: float | None = column("received MiB")
    """Received by the rank that receives most, forward."""
    gb_per_second: float | None = column("GB/s")
    """The same over the time, copies included."""
    extra_mib: float | None = column("memory MiB")
    """Memory at the peak of the forward exchange beyond what the rank holds."""

    @property
    def summary(self) -> str:
        """The times."""
        return self.reason or f"{self.forward_ms:.4g} ms forward, {self.backward_ms:.4g} backward"

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """Length and name."""
        return {"tokens": Text(f"{self.length:,}", justify="right"), "": Text(self.name)}, {}

    @staticmethod
    def tables(report: Report) -> Iterable[tuple[str, Sequence[Row]]]:
        """One, of all lengths."""
        yield f"One layer of attention, {report.facts['ranks']} ranks", report.rows


@dataclass(frozen=True)
class ExchangeCase(Case):
    """Exchanges at several lengths, over all ranks."""

    world: World

    @property
    def main(self) -> bool:
        """Rank 0."""
        return self.world.main

    @property
    def on_a_cpu(self) -> str:
        """The note for CPUs, where gloo exchanges."""
        return "No GPU: these are times of gloo between processes of this machine, and no memory is counted."

    def begin(self, report: Report, log: Log) -> None:
        """Record the number of ranks."""
        report.facts |= {"ranks": self.world.size}

    def order(self, pairs: Sequence[Pair], length: int, report: Report) -> Sequence[Pair]:
        """As they are, on every rank."""
        return pairs

    def row(self, exchange: Exchange, length: int) -> ExchangeRow:
        """An empty row."""
        return ExchangeRow(length=length, name=exchange.name)

    def inputs(self, length: int, report: Report, log: Log) -> Part:
        """This rank's tokens."""
        options, device = self.options, self.world.device
        tokens = length // self.world.size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query = torch.ones(options.heads, tokens, options.head_dim, dtype=dtype, device=device)
        key_value = torch.ones(2, options.kv_heads, tokens, options.head_dim, dtype=dtype, device=device)
        pattern = PowerPattern(block=options.block, window=options.window, sinks=options.sinks)
        return Part(query, key_value, self.world, pattern, dist.group.WORLD)

    def measure(self, exchange: Exchange, part: Part, row: Any, report: Report) -> None:
        """Forward, then backward of what that gave."""
        found, extra = peak(lambda: exchange.forward(part), self.world.device)
        row.received_mib = self.world.largest(exchange.received(part)) / MIB
        row.extra_mib = None if extra is None else self.world.largest(extra) / MIB
        row.forward_ms = self._ms(lambda: exchange.forward(part))
        row.backward_ms = self._ms(lambda: exchange.backward(part, found))
        row.gb_per_second = row.received_mib * MIB / row.forward_ms / 1e6

    def _ms(self, call: Callable[[], object]) -> float:
        """The median time in ms on the slowest rank; every rank calls it as often."""
        times = []
        for _ in range(WARMUP + self.options.repeats):
            dist.barrier()
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            times.append(1e3 * (time.perf_counter() - began))
        return self.world.largest(median(times[WARMUP:]))

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def failed(self, exchange: Exchange, row: Row, error: Exception) -> None:
        """A fault of one rank ends the benchmark: the others wait in a collective."""
        row.reason = explain(error)
        raise BenchError(f"{exchange.name} at {row.length:,} tokens, rank {self.world.rank}: {row.reason}") from error
