"""One new token a sequence behind a cache: the problem, its definition, and how it is timed and shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from sparsetrain_kernels import block_pattern_decode
from torch import Tensor

from sparsetrain.bench.case import Case, Log
from sparsetrain.bench.check import TOLERANCE, relative_error
from sparsetrain.bench.contenders.base import Contender
from sparsetrain.bench.measure import captured, copy_gbps, explain
from sparsetrain.bench.problem import DEVIATION, Shape
from sparsetrain.bench.table import ComparedRow, Panel, Report, column, formatted, number
from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.sparsek.oracle import attended
from sparsetrain.patterns import FullPattern, PowerPattern

DIRECTIONS = 4
"""Directions that keys have and query heads look for, of each KV head."""
STRONG_SHARE = 0.03
"""Share of the keys that have one."""
RUN = 16
"""Keys in a row that have the same."""
LOGIT = 11.0
"""Mean logit of a key with the direction that a query looks for; others have normal ones of variance 2 around 0."""


class Layer(NamedTuple):
    """The inputs of one layer: ``query [batch, heads, 1, head_dim]`` and caches ``[batch, kv_heads, length,
    head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class DecodeProblem(Shape):
    """A step of every sequence behind caches that hold ``length`` tokens, the new one included."""

    pattern: PowerPattern = field(kw_only=True)
    topk: int = field(kw_only=True)
    """Tokens that SparseK selects, and of its window."""
    layers: int = field(kw_only=True)
    """Caches that are read in turn, as the layers of a model are, so that none is still in the L2 cache."""

    p: float = field(kw_only=True)
    """Share of the estimated weight that Twilight keeps."""
    candidates: int = field(kw_only=True)
    """Tokens that Quest passes on."""
    every: int = field(kw_only=True)
    """Steps that read the same choice."""

    def tensors(self, seed: int = 0) -> list[Layer]:
        """Random tensors of each layer."""
        generator = self.generator(seed)
        return [self._layer(generator) for _ in range(self.layers)]

    def _layer(self, generator: torch.Generator) -> Layer:
        """Normal tensors; some keys have a strong direction on top, and each query one that it looks for, so that few
        keys hold most of the weight, as in trained models."""
        sizes = ((self.heads, 1), *[(self.kv_heads, self.length)] * 2)
        query, key, value = (self.normal(generator, *size) for size in sizes)
        strong = self.normal(generator, self.kv_heads, DIRECTIONS)
        strong *= LOGIT**0.5 * self.head_dim**0.25 / strong.norm(dim=-1, keepdim=True)
        looks_for = torch.arange(self.heads // self.kv_heads, device=self.device) % DIRECTIONS
        query += strong[:, :, looks_for].flatten(1, 2)[:, :, None]
        runs = (self.batch, self.kv_heads, -(-self.length // RUN))
        which = torch.randint(round(DIRECTIONS / STRONG_SHARE), runs, device=self.device, generator=generator)
        added = torch.cat([strong, torch.zeros_like(strong[:, :, :1])], 2)
        added = added.gather(2, which.clamp_max(DIRECTIONS)[..., None].expand(*runs, self.head_dim))
        key += added.repeat_interleave(RUN, 2)[:, :, : self.length]
        return Layer(query, key, value)

    @property
    def sparsek(self) -> SparseKConfig:
        """The method that selects keys, with its defaults but for ``topk``."""
        return SparseKConfig(topk=self.topk, window=self.topk)

    def cache_lengths(self) -> Tensor:
        """The length of every sequence, int32 ``[batch]``."""
        return torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)

    def scores(self, seed: int = 0) -> Tensor:
        """The scores for SparseK's selection, fp32 ``[batch, kv_heads, length]``, as in ``bench sparsek``."""
        return DEVIATION * self.normal_scores(seed)

    def bytes_read(self, reads: str) -> int:
        """Bytes of keys and values that one layer's step has to read: of ``all``, of ``blocks`` or of ``selected``."""
        keys = self.length
        if reads == "selected":
            keys = min(keys, self.sparsek.sinks + self.sparsek.topk + self.sparsek.window)
        elif reads == "blocks":
            keys = self.listed_keys
        return keys * self.bytes_of_a_token

    @property
    def listed_keys(self) -> int:
        """Keys in the blocks that the pattern lists for the newest token."""
        own = (self.length - 1) // self.pattern.block
        listed = len(self.pattern.key_blocks(own)) - 1
        return listed * self.pattern.block + self.length - own * self.pattern.block

    @property
    def bytes_of_a_token(self) -> int:
        """Bytes of the keys and values of a token in every sequence."""
        return 2 * self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize

    def definition(self, layer: Layer, reads: str) -> Tensor:
        """The reference output ``[batch, heads, 1, head_dim]`` by sequence: fp32, for selected keys fp64."""
        if reads == "selected":
            return torch.stack([self._selected(*text) for text in zip(*layer, self.scores(), strict=True)])
        pattern = self.pattern if reads == "blocks" else FullPattern(self.pattern.block)
        return block_pattern_decode(*layer, pattern, lengths=self.cache_lengths(), backend="reference")

    def over(self, layer: Layer, visible: Tensor) -> Tensor:
        """The reference output ``[batch, heads, 1, head_dim]``, fp32, over the keys of ``visible [batch, kv_heads,
        length]``, by sequence."""
        return torch.stack([self._over(*text) for text in zip(*layer, visible, strict=True)])

    def _over(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        rows = query.float().unflatten(0, (self.kv_heads, -1))[:, :, 0]
        logits = rows @ key.float().mT * self.head_dim**-0.5
        weights = logits.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        return (weights @ value.float()).flatten(0, 1)[:, None]

    def _selected(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        method, remembered = self.sparsek, self.sparsek.score_buffer or 4 * self.topk
        sizes, last, scale = (method.topk, method.window, method.sinks), self.length - 1, self.head_dim**-0.5
        out = attended(
            query[:, 0], key, value, scores, last, *sizes, gate=method.gate, scale=scale, remembered=remembered
        )
        return out[:, None]


@dataclass(kw_only=True)
class DecodeRow(ComparedRow):
    """One implementation at one length."""

    bytes_read: float | None = column("MB read", form=lambda size: number(None if size is None else size / 1e6))
    """Keys and values that this method has to read, and what it reads to choose them (codes, bounds), in bytes; of
    chosen keys, those that were."""
    kept: float | None = column("keys read", form=formatted("{:.2%}"))
    """Share of the keys of all KV heads that the step attends to."""
    ms: float | None = column("ms", panel=Panel("One decoding step of one layer", "ms", log=True))
    """Time of one layer's step."""
    gbps: float | None = column(
        "GB/s", panel=Panel("Rate of the bytes that the method must read", "GB/s", limit=("copy_gbps", "copy"))
    )
    """``bytes_read`` over the time, in GB/s."""
    floor_ms: float | None = column("floor ms")
    """``bytes_read`` at the bandwidth of a copy."""
    floor_ratio: float | None = column("x floor")
    """Time over that floor."""
    speedup: float | None = column("speed-up")
    """Time of the fastest implementation that reads the whole cache over this one."""
    error: float | None = column("error", form=formatted("{:.1e}"))
    """Relative RMS error against the fp32 reference."""

    @property
    def order_ms(self) -> float | None:
        """Time of the step."""
        return self.ms

    def complete(self, copy_gbps: float | None) -> None:
        """Compute the values that depend on the time."""
        if copy_gbps and self.bytes_read is not None:
            self.floor_ms = self.bytes_read / copy_gbps / 1e6
        if self.ms is not None and self.bytes_read is not None:
            self.gbps = self.bytes_read / self.ms / 1e6
            self.floor_ratio = None if self.floor_ms is None else self.ms / self.floor_ms

    @property
    def summary(self) -> str:
        """The time and the check."""
        return self.reason if self.ms is None else f"{self.ms:.4g} ms, {self.check or 'not checked'}"

    @staticmethod
    def legend(report: Report) -> str:
        """An explanation of the columns."""
        if not (copy := report.facts.get("copy_gbps")):
            return ""
        return (
            f"x floor: time over that of the method's bytes at the {copy:,.0f} GB/s of a copy, measured in this run.\n"
            "speed-up: over the fastest that reads the whole cache. Times are of one layer's step."
        )


def compare(rows: list[DecodeRow]) -> None:
    """Set the times of one length in proportion to the best full-cache row. A failed check takes a row out."""
    sound = [(row, row.ms) for row in rows if row.ms is not None and row.check != "failed"]
    best = min((ms for row, ms in sound if not row.sparse), default=None)
    for row, ms in sound:
        row.speedup = None if best is None else best / ms


Inputs = tuple[DecodeProblem, list[Layer], dict[str, Tensor]]
"""The inputs of implementations at one length; the last are the references, by the keys that are read."""


@dataclass(frozen=True)
class DecodeCase(Case):
    """A decoding step at several lengths, as a CUDA graph."""

    not_counted: ClassVar[str] = "CUDA graphs"

    def problem(self, length: int) -> DecodeProblem:
        """The problem at ``length`` tokens."""
        options = self.options
        pattern = PowerPattern(options.block, options.window, options.sinks)
        return DecodeProblem(
            length=length,
            pattern=pattern,
            **options.model_dump(include={"topk", "layers", "p", "candidates", "every"}),
            **options.shape(),
        )

    def begin(self, report: Report, log: Log) -> None:
        """The rate of a copy."""
        try:
            report.facts["copy_gbps"] = copy_gbps(self.device, self.options.budget)
            log(f"copy within the memory: {report.facts['copy_gbps']:,.0f} GB/s")
        except Exception as error:
            log(f"copy within the memory: {explain(error)}")

    def row(self, contender: Contender, length: int) -> DecodeRow:
        """An empty row."""
        row = DecodeRow.of(contender, length)
        if contender.reads != "chosen":
            problem = self.problem(length)
            row.bytes_read = problem.bytes_read(contender.reads)
            row.kept = row.bytes_read / problem.bytes_read("all")
        return row

    @torch.no_grad()
    def inputs(self, length: int, report: Report, log: Log) -> Inputs:
        """Every layer, and what is to come out of the first."""
        problem = self.problem(length)
        layers = problem.tensors()
        kinds = {each.reads for each in self.contenders} - {"chosen"} if self.options.check else set()
        return problem, layers, {reads: problem.definition(layers[0], reads) for reads in kinds}

    @torch.no_grad()
    def measure(self, contender: Contender, inputs: Inputs, row: Any, report: Report) -> None:
        """The error, then the time."""
        problem, layers, wanted = inputs
        prepared = [contender.prepare(problem, layer) for layer in layers]
        first, row.note = prepared[0], prepared[0].note
        # Layouts that are the caches' own share their memory.
        arranged = [[first.layout.arrange(tensor) for tensor in layer] for layer in layers]
        visible = [each.visible() for each in prepared if each.visible is not None]
        if visible:
            row.kept = sum(float(each.float().mean()) for each in visible) / len(visible)
            row.bytes_read = row.kept * problem.bytes_read("all") + first.beside
        if self.options.check:
            want = problem.over(layers[0], visible[0]) if visible else wanted[contender.reads]
            row.error = relative_error(first.layout.restore(first.attend(*arranged[0])), want)
            row.check = "passed" if row.error <= TOLERANCE[problem.dtype] else "failed"
            for _ in range(first.steps - 1):
                first.attend(*arranged[0])

        def step() -> None:
            for _ in range(first.steps):
                for layer, tensors in zip(prepared, arranged, strict=True):
                    layer.attend(*tensors)

        row.ms = self.time(captured(step) if self.device.type == "cuda" else step) / len(layers) / first.steps

    def finish(self, rows: list[DecodeRow], report: Report) -> None:
        """Rates and proportions."""
        for row in rows:
            row.complete(report.facts.get("copy_gbps"))
        compare(rows)
