"""SparseK in training: the selection, and attention over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from sparsetrain.bench.options import Count, CountOrNone, Lengths, ShapeOptions, Suits, one_of

if TYPE_CHECKING:
    from sparsetrain.bench.attention import AttentionCase, AttentionRow
    from sparsetrain.bench.problem import SparseKProblem
    from sparsetrain.bench.table import Report

CROSSOVER: dict[str, dict[str, Any]] = {
    "cuda": {"topk": 512, "window": 512, "lengths": "1024,2048,4096,8192,16384", "opponents": "ours,fa2"},
    "cpu": {"lengths": "512,1024,2048", "opponents": "ours,sdpa"},
}
"""Other defaults with ``--crossover``, as in the paper, which finds SparseK ahead of FA2 from 4,096 tokens on."""


class Options(ShapeOptions):
    """Time SparseK in training, selection and attention with all gradients, beside dense attention.

    A dense call of more than about two seconds is measured once. What is not installed, or runs out of memory, is
    reported with the reason and stops nothing else.

    Without a GPU it times the plain PyTorch path on short lengths.

    \b
    Examples:
      sparsetrain bench sparsek
      sparsetrain bench sparsek --output bench
      sparsetrain bench sparsek --crossover
      sparsetrain bench sparsek --scores drift --gate log --lengths 131072
      sparsetrain bench sparsek --lengths 1048576 --heads 8 --kv-heads 2 --opponents ours,cudnn
    """

    lengths: Annotated[Lengths, Suits("8192,32768,131072,524288", "1024,4096")]
    """Tokens, commas between."""
    topk: Annotated[Count, Suits(1024, 128)]
    """Selected keys a row, with --crossover 512."""
    window: Annotated[Count, Suits(1024, 128)]
    """Last tokens, the query's own included, with --crossover 512."""
    sinks: CountOrNone = 4
    """First tokens, which every query reads."""
    gate: Annotated[str, one_of("value", "log", "straight")] = "value"
    """value (the paper's), log or straight."""
    scores: Annotated[str, one_of("normal", "drift")] = "normal"
    """normal: 0.7 times standard normal, alike for all tokens, so that selected keys lie anywhere, the worst case;
    drift: newer tokens have larger ones."""
    crossover: bool = False
    """From which length on SparseK is faster than FA2: other defaults, topk and window of 512 and lengths of 1024 to
    16384."""
    opponents: Annotated[str, Suits("all", "all")]
    """ours, cudnn, fa2, fa4; without a GPU: ours, sdpa. Commas between, or all; with --crossover ours,fa2."""

    @classmethod
    def suited(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Others for the crossover."""
        return super().suited(given) | (CROSSOVER[given["device"]] if given.get("crossover") else {})


def case(options: Options) -> AttentionCase:
    """The benchmark.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    from sparsetrain.bench.attention import MAX_CHECKED, AttentionCase
    from sparsetrain.bench.contenders import base, dense, ours
    from sparsetrain.bench.problem import SparseKProblem

    known = (ours.SPARSEK, *(each for each in dense.CAUSAL if False in each.packed))
    fits = base.fitting(known, options.device)
    fixed: dict[str, Any] = {"sinks": options.sinks, "gate": options.gate, "drift": options.scores == "drift"}

    def problem(length: int, topk: int = options.topk, window: int = options.window) -> SparseKProblem:
        return SparseKProblem(length=length, topk=topk, window=window, **fixed, **options.shape())

    def check_problem() -> SparseKProblem:
        """Half of the rows leave keys out; there are fewer keys a row where they are many."""
        parts = max(1, -(-2 * (options.topk + options.window + options.sinks) // MAX_CHECKED))
        topk, window = max(1, options.topk // parts), max(1, options.window // parts)
        # A multiple of 128, as long lengths are: what compiles for those compiles once.
        return problem(-(-2 * (topk + window + options.sinks) // 128) * 128, topk, window)

    keys = f"topk {options.topk}, window {options.window}, {options.sinks} sinks"
    return AttentionCase(
        name="sparsek-crossover" if options.crossover else "sparsek",
        options=options,
        contenders=base.choose(options.opponents, fits, known, f"on {options.device}"),
        known=known,
        subject=f"SparseK, {keys}, gate {options.gate}, {options.scores} scores",
        ours=ours.SPARSEK,
        problem=problem,
        check_problem=check_problem,
        conclude=_conclude if options.crossover else lambda report: (),
    )


def _conclude(report: Report) -> Iterator[str]:
    """From which length on SparseK is faster."""
    for title, length in crossovers(report.rows).items():
        faster = "slower at the longest length measured" if length is None else f"faster from {length:,} tokens on"
        yield f"SparseK's forward and backward pass against {title}: {faster}"


def crossovers(rows: Sequence[AttentionRow]) -> dict[str, int | None]:
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
