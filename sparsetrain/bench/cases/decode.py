"""A decoding step of PowerAttention, of SparseK and of full attention that chooses keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsetrain.bench.options import Count, Lengths, PatternOptions, Suits

if TYPE_CHECKING:
    from sparsetrain.bench.decoding import DecodeCase


class Options(PatternOptions):
    """Time a decoding step of PowerAttention, SparseK, Twilight and Quest beside attention over the whole cache.

    One new token a sequence, as a CUDA graph. Beside each time stands the floor: the bytes that the method must read
    at the bandwidth of a copy. Steps that choose keys write the new token, estimate, choose and attend in that time.
    One key in 33 has one of four directions, in runs of 16, and each query head looks for one of them: top-p then keeps
    about 2 % of 131,072 keys. The share that was read is in the table.

    Without a GPU it times the plain PyTorch path on short caches.

    \b
    Examples:
      sparsetrain bench decode
      sparsetrain bench decode --output bench
      sparsetrain bench decode --lengths 131072 --opponents twilight,twilight-quest,quest,refresh,cudnn
      sparsetrain bench decode --lengths 1048576 --batch 1 --layers 1 --opponents ours,flash
    """

    lengths: Annotated[Lengths, Suits("8192,32768,131072", "1024,4096")]
    """Tokens in the caches, commas between."""
    batch: Annotated[Count, Suits(8, 2)]
    """Sequences."""
    topk: Annotated[Count, Suits(1024, 128)]
    """Keys that SparseK selects, and of its window."""
    p: Annotated[float, Field(ge=0.001, le=1)] = 0.95
    """Share of the estimated weight that Twilight keeps."""
    candidates: Annotated[int, Field(ge=16), Suits(8192, 256)]
    """Keys that Quest or Double Sparsity pass on, for Twilight or to be read; Quest's paper has a quarter of the
    cache."""
    every: Count = 8
    """Steps that read the same choice in the row of choices used again; its time is the mean of them."""
    layers: Annotated[Count, Suits(4, 1)]
    """Caches read in turn, so that none is still in L2."""
    opponents: str = "all"
    """ours, sparsek, twilight, twilight-quest, quest, channels (Double Sparsity), twilight-channels, twilight-own
    (of ours), refresh, fa2 (the flash-attn package), flash (FlashAttention 2 of torch), cudnn, efficient, math, varlen;
    without a GPU sdpa instead of the last six. Commas between, or all."""
    check: bool = True
    """First compare outputs; what fails is not ranked."""


def case(options: Options) -> DecodeCase:
    """The benchmark.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    from sparsetrain.bench.contenders import base, dense, listed, ours
    from sparsetrain.bench.decoding import DecodeCase

    known = (*ours.STEPS, *listed.STEPS, *dense.STEPS)
    fits = base.fitting(known, options.device)
    power = f"PowerAttention, block {options.block}, window {options.window}"
    return DecodeCase(
        name="decode",
        options=options,
        contenders=base.choose(options.opponents, fits, known, f"on {options.device}"),
        known=known,
        subject=f"Decoding with {power}, SparseK, topk and window {options.topk}, and top-p {options.p}, batch "
        f"{options.batch}",
    )
