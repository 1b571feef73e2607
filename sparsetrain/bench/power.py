"""What ``sparsetrain bench power`` measures: the options of the command, checked and completed for this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsetrain.bench.attention_opponents import OPPONENTS, Opponent, opponents_for
from sparsetrain.bench.options import resolve_shape
from sparsetrain.bench.problem import Problem, document_lengths
from sparsetrain.errors import BenchError
from sparsetrain.patterns import PowerPattern

MAX_CHECKED = 8192
"""Tokens of the comparison with the oracle, which builds the whole mask."""


@dataclass(frozen=True)
class PowerBench:
    """One benchmark. :func:`resolve` makes it from the command line."""

    device: torch.device
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pattern: PowerPattern
    batch: int
    packed: bool
    opponents: tuple[Opponent, ...]
    budget_ms: float
    """Time to repeat each measurement for, in ms."""
    check: bool

    def problem(self, length: int) -> Problem:
        """The problem at ``length`` tokens."""
        return self._problem(length, document_lengths(length) if self.packed else None)

    def check_problem(self) -> Problem:
        """A short problem in which some query reads a far block; packed, with a document of one token inside."""
        block, first_far = self.pattern.block, 1 << (self.pattern.window - 1).bit_length()
        blocks = min(first_far + self.pattern.sinks + 2, max(MAX_CHECKED // block, 2))
        length, last = blocks * block, block + block // 2
        return self._problem(length, (length - last - 1, 1, last) if self.packed else None)

    def facts(self) -> dict[str, object]:
        """The options as they are recorded with the results."""
        return {
            "device": self.device.type,
            "lengths": list(self.lengths),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "block": self.pattern.block,
            "window": self.pattern.window,
            "sinks": self.pattern.sinks,
            "batch": self.batch,
            "packed": self.packed,
            "opponents": [each.name for each in self.opponents],
            "budget_ms": self.budget_ms,
            "check": self.check,
        }

    def _problem(self, length: int, documents: tuple[int, ...] | None) -> Problem:
        return Problem(
            pattern=self.pattern,
            length=length,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            batch=self.batch,
            documents=documents,
        )


def resolve(
    *,
    lengths: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    batch: int = 1,
    packed: bool = False,
    opponents: str = "all",
    budget_ms: float = 150.0,
    check: bool = True,
    device: str | None = None,
) -> PowerBench:
    """Check the options and fill in what suits the machine: long sequences in bfloat16 on CUDA, short ones on a CPU.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    shape = resolve_shape(device, lengths, heads, kv_heads, dtype)
    if packed and batch != 1:
        raise BenchError(f"--batch {batch} does not go with --packed, which packs one sequence; use --batch 1")
    return PowerBench(
        device=shape.device,
        lengths=shape.lengths,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim,
        dtype=shape.dtype,
        pattern=PowerPattern(block, window, sinks),
        batch=batch,
        packed=packed,
        opponents=_parse_opponents(opponents, shape.device.type, packed),
        budget_ms=budget_ms,
        check=check,
    )


def _parse_opponents(text: str, device: str, packed: bool) -> tuple[Opponent, ...]:
    fitting = opponents_for(device, packed)
    if text == "all":
        return tuple(fitting.values())
    known = {each.name for each in OPPONENTS}
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise BenchError(f"--opponents {name!r} is not known; choose from {', '.join(fitting)}, or all")
        if name not in fitting:
            here = f"on {device} {'with' if packed else 'without'} --packed"
            raise BenchError(f"--opponents {name} cannot be measured {here}; choose from {', '.join(fitting)}, or all")
    return tuple(fitting[name] for name in names)
