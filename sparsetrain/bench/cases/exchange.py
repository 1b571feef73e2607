"""What ranks that share a row send one another, timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from sparsetrain.bench.options import Count, CountOrNone, Folder, Lengths, Suits
from sparsetrain.bench.options import Options as AnyOptions
from sparsetrain.errors import BenchError
from sparsetrain.recipe.heads import heads_fault

if TYPE_CHECKING:
    from sparsetrain.bench.exchanging import ExchangeCase


class Options(AnyOptions):
    """Time what ranks that share a row send one another in a layer of attention, by all-to-all and between neighbours.

    The ranks are those of the launcher, one a GPU. All-to-all is what `sequence.parallel` does; between neighbours, a
    rank gets the keys and values of the ranks that PowerAttention's pattern reaches, and no queries or outputs move.

    \b
    Example:
      torchrun --nproc-per-node 2 -m sparsetrain.cli bench exchange --lengths 131072,1048576
    """

    lengths: Annotated[Lengths, Suits("131072,524288,1048576", "1024,4096")]
    """Tokens in a row, commas between."""
    heads: Annotated[Count, Suits(32, 4)]
    """Query heads."""
    kv_heads: Annotated[Count, Suits(8, 2)]
    """KV heads."""
    head_dim: Count = 128
    """Elements of a head."""
    block: Annotated[Count, Suits(256, 64)]
    """Tokens in a block of the pattern."""
    window: Count = 5
    """Nearest blocks, the query's own included."""
    sinks: CountOrNone = 1
    """First blocks, which every query reads."""
    repeats: Count = 5
    """Timed repeats of each."""
    output: Folder = None
    """Folder for the CSV and the JSON."""


def case(options: Options) -> ExchangeCase:
    """The benchmark; of several ranks, each makes it.

    Raises:
        BenchError: the ranks cannot share the heads or the tokens.
    """
    from sparsetrain.bench.exchanging import ALL_TO_ALL, NEIGHBOURS, ExchangeCase
    from sparsetrain.training.distributed.engine import init_world

    world = init_world()
    if world.size == 1:
        raise BenchError(
            "one rank sends nothing; start it by a launcher: torchrun --nproc-per-node 2 -m sparsetrain.cli bench "
            "exchange"
        )
    fault = heads_fault(world.size, options.heads, options.kv_heads)
    if fault is None and options.kv_heads % world.size:
        fault = f"--kv-heads {options.kv_heads} is not a multiple of {world.size} ranks"
    if fault is not None:
        raise BenchError(fault)
    for length in options.lengths:
        if length % (options.block * world.size):
            raise BenchError(
                f"--lengths {length}: {world.size} ranks hold whole blocks of {options.block} tokens each; take a "
                f"multiple of {options.block * world.size}"
            )
    return ExchangeCase(
        name="exchange",
        options=options,
        contenders=(ALL_TO_ALL, NEIGHBOURS),
        known=(ALL_TO_ALL, NEIGHBOURS),
        subject=f"What {world.size} ranks that share a row send one another",
        world=world,
    )
