"""What ``sparsetrain bench decode`` measures: the options of the command, and one decoding step at one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.bench.decode_opponents import OPPONENTS, DecodeOpponent
from sparsetrain.bench.options import resolve_shape
from sparsetrain.bench.sparsek_problem import DEVIATION
from sparsetrain.errors import BenchError
from sparsetrain.methods.sparsek import SparseKConfig
from sparsetrain.patterns import PowerPattern


class Layer(NamedTuple):
    """What one layer attends to: ``query [batch, heads, 1, head_dim]`` and caches ``[batch, kv_heads, length,
    head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class DecodeProblem:
    """A step of every sequence behind caches that hold ``length`` tokens, the new one included."""

    pattern: PowerPattern
    topk: int
    """Tokens that SparseK selects, and of its window."""
    length: int
    """Tokens."""
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    layers: int
    """Caches that are read in turn, as the layers of a model are, so that none is still in the L2 cache."""

    def tensors(self, seed: int = 0) -> list[Layer]:
        """Normal random tensors of each layer, the same for every implementation."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(heads: int, tokens: int) -> Tensor:
            shape = (self.batch, heads, tokens, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

        kv_heads, length = self.kv_heads, self.length
        return [
            Layer(normal(self.heads, 1), normal(kv_heads, length), normal(kv_heads, length)) for _ in range(self.layers)
        ]

    @property
    def sparsek(self) -> SparseKConfig:
        """The method that selects keys, with its defaults but for ``topk``."""
        return SparseKConfig(topk=self.topk, window=self.topk)

    def lengths(self) -> Tensor:
        """The length of every sequence, int32 ``[batch]``."""
        return torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)

    def scores(self, seed: int = 0) -> Tensor:
        """What SparseK selects keys by, fp32 ``[batch, kv_heads, length]``: those of ``bench sparsek``."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (self.batch, self.kv_heads, self.length)
        return DEVIATION * torch.randn(shape, device=self.device, generator=generator)

    def bytes_read(self, reads: str) -> int:
        """Bytes of keys and values that one layer's step has to read: of ``all``, of ``blocks`` or of ``selected``."""
        keys = self.length
        if reads == "selected":
            keys = min(keys, self.sparsek.sinks + self.sparsek.topk + self.sparsek.window)
        elif reads == "blocks":
            own = (self.length - 1) // self.pattern.block
            listed = len(self.pattern.key_blocks(own)) - 1
            keys = listed * self.pattern.block + self.length - own * self.pattern.block
        return 2 * keys * self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class DecodeBench:
    """One benchmark. :func:`resolve` makes it from the command line."""

    device: torch.device
    lengths: tuple[int, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pattern: PowerPattern
    topk: int
    layers: int
    opponents: tuple[DecodeOpponent, ...]
    budget_ms: float
    """Time to repeat each measurement for, in ms."""
    check: bool

    def problem(self, length: int) -> DecodeProblem:
        """The problem at ``length`` tokens."""
        return DecodeProblem(
            pattern=self.pattern,
            topk=self.topk,
            length=length,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            layers=self.layers,
        )

    def facts(self) -> dict[str, object]:
        """The options as they are recorded with the results."""
        return {
            "device": self.device.type,
            "lengths": list(self.lengths),
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "block": self.pattern.block,
            "window": self.pattern.window,
            "sinks": self.pattern.sinks,
            "topk": self.topk,
            "layers": self.layers,
            "opponents": [each.name for each in self.opponents],
            "budget_ms": self.budget_ms,
            "check": self.check,
        }


def resolve(
    *,
    lengths: str | None = None,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    topk: int | None = None,
    layers: int | None = None,
    opponents: str = "all",
    budget_ms: float = 150.0,
    check: bool = True,
    device: str | None = None,
) -> DecodeBench:
    """Check the options and fill in what suits the machine: long caches in bfloat16 on CUDA, short ones on a CPU.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    shape = resolve_shape(device, lengths, heads, kv_heads, dtype)
    return DecodeBench(
        device=shape.device,
        lengths=shape.lengths,
        batch=batch or (8 if shape.device.type == "cuda" else 2),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim,
        dtype=shape.dtype,
        pattern=PowerPattern(block, window, sinks),
        topk=topk or (1024 if shape.device.type == "cuda" else 128),
        layers=layers or (4 if shape.device.type == "cuda" else 1),
        opponents=_parse_opponents(opponents, shape.device.type),
        budget_ms=budget_ms,
        check=check,
    )


def _parse_opponents(text: str, device: str) -> tuple[DecodeOpponent, ...]:
    fitting = {each.name: each for each in OPPONENTS if device in each.devices}
    if text == "all":
        return tuple(fitting.values())
    known = {each.name for each in OPPONENTS}
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise BenchError(f"--opponents {name!r} is not known; choose from {', '.join(fitting)}, or all")
        if name not in fitting:
            raise BenchError(f"--opponents {name} cannot be measured on {device}; choose from {', '.join(fitting)}")
    return tuple(fitting[name] for name in names)
