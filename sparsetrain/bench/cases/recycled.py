"""Recycled attention in training: rows that attend fully, their choices, and attention over lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sparsetrain.bench.options import Count, CountOrNone, Lengths, ShapeOptions, Suits

if TYPE_CHECKING:
    from sparsetrain.bench.attention import AttentionCase
    from sparsetrain.bench.problem import RecycledProblem


class Options(ShapeOptions):
    """Time recycled attention in training, choices and all gradients included, beside dense attention.

    The parts are timed apart: the rows that attend fully and the attention over lists, both forward and backward, and
    the choice, which has no gradient. A dense call of more than about two seconds is measured once. What is not
    installed, or runs out of memory, is reported with the reason and stops nothing else.

    Without a GPU it times the plain PyTorch path on short lengths.

    \b
    Examples:
      sparsetrain bench recycled
      sparsetrain bench recycled --lengths 131072 --every 32 --keep 2048
      sparsetrain bench recycled --output bench --opponents ours,cudnn
    """

    lengths: Annotated[Lengths, Suits("8192,32768,131072", "512,1024")]
    """Tokens, commas between."""
    every: Annotated[Count, Suits(16, 16)]
    """Tokens between two choices."""
    keep: Annotated[Count, Suits(1024, 64)]
    """Keys of a choice."""
    sinks: CountOrNone = 4
    """First tokens, which every query reads."""
    recent: CountOrNone = 64
    """Last tokens at a choice, which are read until the next."""
    opponents: Annotated[str, Suits("all", "all")]
    """ours, cudnn, fa2, fa4; without a GPU: ours, sdpa. Commas between, or all."""


def case(options: Options) -> AttentionCase:
    """The benchmark.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    from sparsetrain.bench.attention import MAX_CHECKED, AttentionCase
    from sparsetrain.bench.contenders import base, dense, recycled
    from sparsetrain.bench.problem import RecycledProblem

    known = (recycled.RECYCLED, *(each for each in dense.CAUSAL if False in each.packed))
    fits = base.fitting(known, options.device)

    def problem(length: int, keep: int = options.keep, recent: int = options.recent) -> RecycledProblem:
        given: dict[str, Any] = {"every": options.every, "keep": keep, "sinks": options.sinks, "recent": recent}
        return RecycledProblem(length=length, **given, **options.shape())

    def check_problem() -> RecycledProblem:
        """Half of the rows leave keys out; there are fewer keys a row where they are many."""
        parts = max(1, -(-2 * (options.keep + options.recent + options.sinks) // MAX_CHECKED))
        keep, recent = max(1, options.keep // parts), options.recent // parts
        length = max(2 * (keep + recent + options.sinks), 4 * options.every)
        return problem(-(-length // 128) * 128, keep, recent)

    keys = f"{options.keep} keys, {options.recent} recent, {options.sinks} sinks"
    return AttentionCase(
        name="recycled",
        options=options,
        contenders=base.choose(options.opponents, fits, known, f"on {options.device}"),
        known=known,
        subject=f"Recycled attention, a choice every {options.every} tokens of {keys}",
        ours=recycled.RECYCLED,
        problem=problem,
        check_problem=check_problem,
        conclude=lambda report: (),
    )
