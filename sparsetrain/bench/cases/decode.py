"""A decoding step of PowerAttention and of SparseK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from sparsetrain.bench.options import Count, Lengths, PatternOptions, Suits

if TYPE_CHECKING:
    from sparsetrain.bench.decoding import DecodeCase


class Options(PatternOptions):
    """Time a decoding step of PowerAttention and of SparseK beside attention over the whole cache.

    One new token a sequence, as a CUDA graph. Beside each time stands the floor: the bytes that the method must read
    at the bandwidth of a copy.

    Without a GPU it times the plain PyTorch path on short caches.

    \b
    Examples:
      sparsetrain bench decode
      sparsetrain bench decode --output bench
      sparsetrain bench decode --lengths 1048576 --batch 1 --layers 1 --opponents ours,flash
    """

    lengths: Annotated[Lengths, Suits("8192,32768,131072", "1024,4096")]
    """Tokens in the caches, commas between."""
    batch: Annotated[Count, Suits(8, 2)]
    """Sequences."""
    topk: Annotated[Count, Suits(1024, 128)]
    """Keys that SparseK selects, and of its window."""
    layers: Annotated[Count, Suits(4, 1)]
    """Caches read in turn, so that none is still in L2."""
    opponents: str = "all"
    """ours, sparsek, flash, cudnn, efficient, math, varlen; without a GPU: ours, sparsek, sdpa. Commas between, or
    all."""
    check: bool = True
    """First compare outputs; what fails is not ranked."""


def case(options: Options) -> DecodeCase:
    """The benchmark.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    from sparsetrain.bench.contenders import base, dense, ours
    from sparsetrain.bench.decoding import DecodeCase

    known = (*ours.STEPS, *dense.STEPS)
    fits = base.fitting(known, options.device)
    power = f"PowerAttention, block {options.block}, window {options.window}"
    return DecodeCase(
        name="decode",
        options=options,
        contenders=base.choose(options.opponents, fits, known, f"on {options.device}"),
        known=known,
        subject=f"Decoding with {power}, and SparseK, topk and window {options.topk}, batch {options.batch}",
    )
