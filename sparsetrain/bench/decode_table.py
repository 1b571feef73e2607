"""Measure every implementation of a decoding step at every length; what fails becomes a reason in its row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from sparsetrain_kernels import block_pattern_decode, sparsek_threshold
from torch import Tensor

from sparsetrain.bench.check import TOLERANCE, relative_error
from sparsetrain.bench.decode import DecodeBench, DecodeProblem, Layer
from sparsetrain.bench.decode_opponents import DecodeOpponent
from sparsetrain.bench.timing import explain, median_ms, release
from sparsetrain.methods.sparsek import SparseKConfig
from sparsetrain.patterns import FullPattern

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Of the copy that measures the bandwidth: far more than any cache holds."""

Log = Callable[[str], None]


@dataclass
class DecodeRow:
    """One implementation at one length. What was not measured is None, and ``reason`` says why."""

    length: int
    name: str
    title: str
    sparse: bool
    bytes_read: int
    """Keys and values that this method has to read, in bytes."""
    ms: float | None = None
    """Time of one layer's step."""
    gbps: float | None = None
    """``bytes_read`` over the time, in GB/s."""
    floor_ms: float | None = None
    """``bytes_read`` at the bandwidth of a copy."""
    floor_ratio: float | None = None
    """Time over that floor."""
    speedup: float | None = None
    """Time of the fastest implementation that reads the whole cache over this one."""
    error: float | None = None
    """Relative RMS error against the fp32 reference."""
    check: str = ""
    note: str = ""
    reason: str = ""

    def complete(self, copy_gbps: float | None) -> None:
        """Work out what follows from the time."""
        if copy_gbps:
            self.floor_ms = self.bytes_read / copy_gbps / 1e6
        if self.ms is not None:
            self.gbps = self.bytes_read / self.ms / 1e6
            self.floor_ratio = None if self.floor_ms is None else self.ms / self.floor_ms

    @property
    def summary(self) -> str:
        """The row in a few words, for the log."""
        return self.reason if self.ms is None else f"{self.ms:.4g} ms, {self.check or 'not checked'}"


def compare(rows: Iterable[DecodeRow]) -> None:
    """Set the times of one length in proportion to the best full-cache row. A failed check takes a row out."""
    sound = [(row, row.ms) for row in rows if row.ms is not None and row.check != "failed"]
    best = min((ms for row, ms in sound if not row.sparse), default=None)
    for row, ms in sound:
        row.speedup = None if best is None else best / ms


def copy_gbps(device: torch.device, budget_ms: float) -> float:
    """What a copy within the memory reaches here, bytes read and written together, in GB/s."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.zero_()
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device=device, budget_ms=budget_ms) / 1e6


def measure(bench: DecodeBench, copy_rate: float | None, log: Log) -> Iterator[list[DecodeRow]]:
    """The rows of one length after the other."""
    for length in bench.lengths:
        rows = measure_length(bench, length, log)
        for row in rows:
            row.complete(copy_rate)
        compare(rows)
        yield rows


def measure_length(bench: DecodeBench, length: int, log: Log) -> list[DecodeRow]:
    """All implementations at one length, timed in shuffled order and returned in that of ``bench``."""
    problem = bench.problem(length)
    rows = {
        each.name: DecodeRow(length, each.name, each.title, each.sparse, problem.bytes_read(each.reads))
        for each in bench.opponents
    }
    order = list(bench.opponents)
    random.Random(length).shuffle(order)
    wanted: dict[str, Tensor] = {}
    try:
        layers = problem.tensors()
        if bench.check:
            wanted = {reads: reference(problem, layers[0], reads) for reads in {each.reads for each in order}}
    except Exception as error:
        for row in rows.values():
            row.reason = explain(error)
        return list(rows.values())
    for opponent in order:
        row = rows[opponent.name]
        _measure(opponent, bench, problem, layers, wanted.get(opponent.reads), row)
        release()
        log(f"{length:>9,}  {opponent.name:10}  {row.summary}")
    return list(rows.values())


def reference(problem: DecodeProblem, layer: Layer, reads: str) -> Tensor:
    """The definition, computed in fp32 a sequence at a time."""
    if reads == "selected":
        rows = [selected_reference(problem.sparsek, *row) for row in zip(*layer, problem.scores(), strict=True)]
        return torch.stack(rows)
    pattern = problem.pattern if reads == "blocks" else FullPattern(problem.pattern.block)
    return block_pattern_decode(*layer, pattern, lengths=problem.lengths(), backend="reference")


def selected_reference(config: SparseKConfig, query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
    """SparseK attention of the last token of one sequence, whose keys are all still there (2406.16747, 3).

    The threshold is that of the scores that generation remembers.

    Args:
        query: ``[Hq, 1, D]``.
        key, value: ``[H, N, D]``.
        scores: ``[H, N]``.

    Returns:
        fp32 ``[Hq, 1, D]``.
    """
    leaves_window = max(key.shape[1] - config.window, config.sinks)
    candidates = scores[:, config.sinks : leaves_window]
    remembered = candidates.topk(min(candidates.shape[1], config.score_buffer or 4 * config.topk)).values
    gates, seen = torch.ones_like(scores), torch.ones_like(scores, dtype=torch.bool)
    if candidates.shape[1] > config.topk:
        threshold = sparsek_threshold(remembered.double(), config.topk)[:, None]
        gates[:, config.sinks : leaves_window] = (candidates - threshold).clamp(0, 1)
        seen[:, config.sinks : leaves_window] = candidates >= remembered[:, config.topk - 1 : config.topk]
    grouped = query.float().view(key.shape[0], -1, key.shape[2])
    logits = grouped @ key.float().mT * key.shape[2] ** -0.5
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1) * gates[:, None]
    return (weights @ value.float()).view(query.shape)


def _measure(
    opponent: DecodeOpponent,
    bench: DecodeBench,
    problem: DecodeProblem,
    layers: list[Layer],
    wanted: Tensor | None,
    row: DecodeRow,
) -> None:
    """Fill the row of one implementation. What was measured before a failure is kept."""
    try:
        prepared = [opponent.prepare(problem, layer) for layer in layers]
        first, row.note = prepared[0], prepared[0].note
        # Layouts that are the caches' own share their memory.
        arranged = [[first.layout.arrange(tensor) for tensor in layer] for layer in layers]
        if wanted is not None:
            row.error = relative_error(first.layout.restore(first.attend(*arranged[0])), wanted)
            row.check = "passed" if row.error <= TOLERANCE[bench.dtype] else "failed"

        def step() -> None:
            for layer, tensors in zip(prepared, arranged, strict=True):
                layer.attend(*tensors)

        run = captured(step) if bench.device.type == "cuda" else step
        row.ms = median_ms(run, device=bench.device, budget_ms=bench.budget_ms) / len(layers)
    except Exception as error:
        row.reason = explain(error)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, which is how decoding runs: the host's work for each launch is not measured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and fills caches of plans and tables
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
