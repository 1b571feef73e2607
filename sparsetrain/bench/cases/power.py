"""PowerAttention's kernels, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsetrain.bench.options import PatternOptions
from sparsetrain.errors import BenchError

if TYPE_CHECKING:
    from sparsetrain.bench.attention import AttentionCase
    from sparsetrain.bench.problem import PatternProblem


class Options(PatternOptions):
    """Time PowerAttention's kernels beside FlexAttention with the same mask, and beside dense attention.

    What is not installed, or runs out of memory, is reported with the reason and stops nothing else.

    Without a GPU it times the plain PyTorch path on short lengths.

    \b
    Examples:
      sparsetrain bench power
      sparsetrain bench power --output bench
      sparsetrain bench power --packed --lengths 65536
      sparsetrain bench power --lengths 1048576 --heads 4 --kv-heads 1 --opponents ours,flex,cudnn
      sparsetrain bench power --opponents ours,flex --lengths 8192 --no-check --budget 500
    """

    packed: bool = False
    """Documents of log-normal lengths of mean 4096, packed into one sequence."""
    opponents: str = "all"
    """ours, ours-triton, flex, flex-tma, flex-flash, fa4-blocks, cudnn, fa2, fa4; packed: ours, ours-triton, flex,
    flex-tma, flex-flash, varlen; without a GPU: ours, sdpa. Commas between, or all."""


def case(options: Options) -> AttentionCase:
    """The benchmark.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    from sparsetrain.bench.attention import MAX_CHECKED, AttentionCase
    from sparsetrain.bench.contenders import base, dense, fa4, flex, ours
    from sparsetrain.bench.problem import PatternProblem, document_lengths
    from sparsetrain.patterns import PowerPattern

    packed, pattern = options.packed, PowerPattern(options.block, options.window, options.sinks)
    if packed and options.batch != 1:
        raise BenchError(f"--batch {options.batch} does not go with --packed, which packs one sequence; use --batch 1")
    known = (*ours.PATTERN, *flex.FLEX, fa4.BLOCKS, *dense.CAUSAL)
    fits = base.fitting(known, options.device, packed)
    here = f"on {options.device} {'with' if packed else 'without'} --packed"

    def problem(length: int, documents: tuple[int, ...] | None = None) -> PatternProblem:
        documents = documents or (document_lengths(length) if packed else None)
        return PatternProblem(length=length, pattern=pattern, documents=documents, **options.shape())

    def check_problem() -> PatternProblem:
        """Some query reads a far block; packed, with a document of one token inside."""
        block, first_far = pattern.block, 1 << (pattern.window - 1).bit_length()
        blocks = min(first_far + pattern.sinks + 2, max(MAX_CHECKED // block, 2))
        length, last = blocks * block, block + block // 2
        return problem(length, (length - last - 1, 1, last) if packed else None)

    return AttentionCase(
        name="power-packed" if packed else "power",
        options=options,
        contenders=base.choose(options.opponents, fits, known, here),
        known=known,
        subject=f"PowerAttention, block {pattern.block}, window {pattern.window}{', packed documents' * packed}",
        ours=ours.PATTERN[0],
        problem=problem,
        check_problem=check_problem,
    )
