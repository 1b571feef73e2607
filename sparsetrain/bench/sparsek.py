"""What ``sparsetrain bench sparsek`` measures: the options of the command, checked and completed for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsetrain_kernels import causal_sparsek, sparsek_attention
from torch import Tensor

from sparsetrain.bench.attention_bench import MAX_CHECKED, AttentionBench, choose_opponents
from sparsetrain.bench.attention_opponents import DENSE, Opponent, Prepared
from sparsetrain.bench.options import resolve_shape
from sparsetrain.bench.problem import Tensors
from sparsetrain.bench.report import Row
from sparsetrain.bench.sparsek_problem import SparseKProblem
from sparsetrain.errors import BenchError

GATES = ("value", "log", "straight")
SCORES = ("normal", "drift")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"keys": 1024, "lengths": "8192,32768,131072,524288", "opponents": "all"},
    "cpu": {"keys": 128, "lengths": "1024,4096", "opponents": "all"},
}
"""``keys``: of ``--topk``, and of ``--window``."""
CROSSOVER: dict[str, dict[str, Any]] = {
    "cuda": {"keys": 512, "lengths": "1024,2048,4096,8192,16384", "opponents": "ours,fa2"},
    "cpu": {"keys": 128, "lengths": "512,1024,2048", "opponents": "ours,sdpa"},
}
"""The same with ``--crossover``, as in the paper, which finds SparseK ahead of FA2 from 4,096 tokens on."""


def _ours(problem: SparseKProblem, tensors: Tensors) -> Prepared:
    """All that a layer does in training once it has scores: the selection, and attention over it."""
    topk, window, sinks = problem.topk, problem.window, problem.sinks

    def attend(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return sparsek_attention(query, key, value, scores, topk, window, sinks, gate=problem.gate)

    def select(scores: Tensor) -> Tensor:
        return causal_sparsek(scores, topk, window, sinks=sinks).threshold

    return Prepared(attend, select=select)


OPPONENTS: tuple[Opponent[SparseKProblem], ...] = (
    Opponent("ours", "sparsetrain", True, _ours, devices=("cuda", "cpu")),
    *(each for each in DENSE if False in each.packed),
)


@dataclass(frozen=True)
class SparseKBench(AttentionBench[SparseKProblem]):
    """One benchmark. :func:`resolve` makes it from the command line."""

    topk: int
    window: int
    sinks: int
    gate: str
    scores: str
    crossover: bool
    """Whether the length from which sparse attention is faster is looked for."""

    @property
    def ours(self) -> Opponent[SparseKProblem]:
        """The only sparse one."""
        return OPPONENTS[0]

    @property
    def subject(self) -> str:
        """The selection in words."""
        keys = f"topk {self.topk}, window {self.window}, {self.sinks} sinks"
        return f"SparseK, {keys}, gate {self.gate}, {self.scores} scores"

    def problem(self, length: int) -> SparseKProblem:
        """The problem at ``length`` tokens."""
        return self._problem(length, self.topk, self.window)

    def check_problem(self) -> SparseKProblem:
        """A short problem in which half of the rows leave keys out; it has fewer keys a row where they are many."""
        parts = max(1, -(-2 * (self.topk + self.window + self.sinks) // MAX_CHECKED))
        topk, window = max(1, self.topk // parts), max(1, self.window // parts)
        # A multiple of 128, as long lengths are: what compiles for those compiles once.
        return self._problem(-(-2 * (topk + window + self.sinks) // 128) * 128, topk, window)

    def facts(self) -> dict[str, object]:
        """The options as they are recorded with the results."""
        return super().facts() | {
            "topk": self.topk,
            "window": self.window,
            "sinks": self.sinks,
            "gate": self.gate,
            "scores": self.scores,
            "crossover": self.crossover,
        }

    def _problem(self, length: int, topk: int, window: int) -> SparseKProblem:
        return SparseKProblem(
            length=length,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            batch=self.batch,
            topk=topk,
            window=window,
            sinks=self.sinks,
            gate=self.gate,
            drift=self.scores == "drift",
        )


def resolve(
    *,
    lengths: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    topk: int | None = None,
    window: int | None = None,
    sinks: int = 4,
    gate: str = "value",
    scores: str = "normal",
    batch: int = 1,
    crossover: bool = False,
    opponents: str | None = None,
    budget_ms: float = 150.0,
    check: bool = True,
    device: str | None = None,
) -> SparseKBench:
    """Check the options and fill in what suits the machine: long sequences in bfloat16 on CUDA, short ones on a CPU.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    for name, value, choices in (("gate", gate, GATES), ("scores", scores, SCORES)):
        if value not in choices:
            raise BenchError(f"--{name} {value} is not known; choose one of {', '.join(choices)}")
    chosen = CROSSOVER if crossover else DEFAULTS
    shape = resolve_shape(
        device, lengths, heads, kv_heads, dtype, {each: str(chosen[each]["lengths"]) for each in chosen}
    )
    defaults = chosen[shape.device.type]
    fitting = {each.name: each for each in OPPONENTS if shape.device.type in each.devices}
    text, known, here = opponents or defaults["opponents"], {each.name for each in OPPONENTS}, f"on {shape.device.type}"
    return SparseKBench(
        **shape._asdict(),
        head_dim=head_dim,
        topk=topk or defaults["keys"],
        window=window or defaults["keys"],
        sinks=sinks,
        gate=gate,
        scores=scores,
        batch=batch,
        crossover=crossover,
        opponents=choose_opponents(text, fitting, known, here),
        budget_ms=budget_ms,
        check=check,
    )


def crossovers(rows: Sequence[Row]) -> dict[str, int | None]:
    """The shortest length from which ours is faster, forward and backward together, at all longer ones measured too.

    Returns:
        It, or None where ours is slower at the longest length, by the title of each dense implementation that was
        measured. What failed, or was not measured together with ours, does not count.
    """
    found: dict[str, int | None] = {}
    for name, title in {row.name: row.title for row in rows if not row.sparse}.items():
        ratios = [(row.length, row.both_ratio) for row in rows if row.name == name and row.both_ratio is not None]
        if not ratios:
            continue
        found[title] = None
        for length, ratio in sorted(ratios, reverse=True):
            if ratio <= 1:
                break
            found[title] = length
    return found
