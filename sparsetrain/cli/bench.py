"""``sparsetrain bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.arguments import Overrides, RecipeArgument

app = typer.Typer(
    help="Time the kernels beside the best implementations of others.", no_args_is_help=True, rich_markup_mode="rich"
)

# Options that several benchmarks share.
QueryHeads = Annotated[
    int | None, typer.Option(min=1, help="Query heads; by default 32, and 4 without a GPU.", show_default=False)
]
KVHeads = Annotated[
    int | None, typer.Option(min=1, help="KV heads; by default 8, and 2 without a GPU.", show_default=False)
]
HeadDim = Annotated[int, typer.Option(min=1, help="Elements of a head.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32; by default bfloat16, and float32 without a GPU.", show_default=False
    ),
]
PatternBlock = Annotated[int, typer.Option(min=1, help="Tokens in a block of the pattern.")]
PatternWindow = Annotated[int, typer.Option(min=1, help="Nearest blocks, the query's own included.")]
PatternSinks = Annotated[int, typer.Option(min=0, help="First blocks, which every query reads.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences.")]
Budget = Annotated[float, typer.Option(min=1, help="Milliseconds to repeat each measurement for.")]
CheckGradients = Annotated[bool, typer.Option(help="First compare outputs and gradients; what fails is not ranked.")]
PictureFolder = Annotated[
    Path | None, typer.Option(help="Folder for the CSV, the JSON and the picture.", show_default=False)
]


@app.command()
def power(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens, commas between; by default 8192,32768,131072, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    block: PatternBlock = 256,
    window: PatternWindow = 5,
    sinks: PatternSinks = 1,
    batch: Sequences = 1,
    packed: Annotated[
        bool, typer.Option(help="Documents of log-normal lengths of mean 4096, packed into one sequence.")
    ] = False,
    opponents: Annotated[
        str,
        typer.Option(
            help="ours, ours-triton, flex, flex-flash, cudnn, fa2, fa4; packed: ours, ours-triton, flex, flex-flash,"
            " varlen; without a GPU: ours, sdpa. Commas between, or all."
        ),
    ] = "all",
    budget: Budget = 150,
    check: CheckGradients = True,
    output: PictureFolder = None,
) -> None:
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
    from sparsetrain.bench.command import run_power

    run_power(
        output=output,
        lengths=lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block=block,
        window=window,
        sinks=sinks,
        batch=batch,
        packed=packed,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )


@app.command()
def sparsek(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens, commas between; by default 8192,32768,131072,524288, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    topk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Selected keys a row; by default 1024, with --crossover 512, and 128 without a GPU.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Last tokens, the query's own included; by default as topk.", show_default=False),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens, which every query reads.")] = 4,
    gate: Annotated[str, typer.Option(help="value (the paper's), log or straight.")] = "value",
    scores: Annotated[
        str,
        typer.Option(
            help="normal: 0.7 times standard normal, alike for all tokens, so that selected keys lie anywhere, the"
            " worst case; drift: newer tokens have larger ones."
        ),
    ] = "normal",
    batch: Sequences = 1,
    crossover: Annotated[
        bool,
        typer.Option(
            "--crossover",
            help="From which length on SparseK is faster than FA2: other defaults, topk and window of 512 and lengths"
            " of 1024 to 16384.",
        ),
    ] = False,
    opponents: Annotated[
        str | None,
        typer.Option(
            help="ours, cudnn, fa2, fa4; without a GPU: ours, sdpa. Commas between, or all, which is the default;"
            " with --crossover it is ours,fa2.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = 150,
    check: CheckGradients = True,
    output: PictureFolder = None,
) -> None:
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
    from sparsetrain.bench.command import run_sparsek

    run_sparsek(
        output=output,
        lengths=lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        topk=topk,
        window=window,
        sinks=sinks,
        gate=gate,
        scores=scores,
        batch=batch,
        crossover=crossover,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )


@app.command()
def step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ways: Annotated[
        str,
        typer.Option(
            help="Commas between: recipe, dense (full attention instead), flex (the pattern by FlexAttention), bare "
            "(no attention: the limit), plain (a short SDPA script), hf and hf-bare (transformers, Liger, DeepSpeed)."
        ),
    ] = "recipe,dense,bare",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens in a row, commas between; by default the recipe's.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; one of more than 20 s is timed once.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the CSV and the JSON.", show_default=False)] = None,
) -> None:
    """Time the training step of a recipe, and its peak memory, beside other ways to take it.

    The model has the recipe's shape and random weights, so nothing is downloaded; rows are random tokens.

    \b
    Examples:
      sparsetrain bench step qwen3-8b-power-lora-64k --lengths 32768,131072 --ways plain,dense,flex,recipe,bare
      sparsetrain bench step my.yaml train.micro_batch=1 train.mlp_chunk=16384 --output bench

    \b
    Several GPUs:
      deepspeed --num_gpus 2 --no_local_rank --module sparsetrain.cli bench step my.yaml deepspeed.stage=3
    """
    from sparsetrain.bench.step import run_step

    run_step(recipe, overrides or [], ways=ways, lengths=lengths, repeats=repeats, output=output)


@app.command()
def decode(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the caches, commas between; by default 8192,32768,131072, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; by default 8, and 2 without a GPU.", show_default=False)
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    block: PatternBlock = 256,
    window: PatternWindow = 5,
    sinks: PatternSinks = 1,
    topk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keys that SparseK selects, and of its window; by default 1024, and 128 without a GPU.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Caches read in turn, so that none is still in L2; by default 4, and 1 without a GPU.",
            show_default=False,
        ),
    ] = None,
    opponents: Annotated[
        str,
        typer.Option(
            help="ours, sparsek, flash, cudnn, efficient, math, varlen; without a GPU: ours, sparsek, sdpa. Commas"
            " between, or all."
        ),
    ] = "all",
    budget: Budget = 150,
    check: Annotated[bool, typer.Option(help="First compare outputs; what fails is not ranked.")] = True,
    output: PictureFolder = None,
) -> None:
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
    from sparsetrain.bench.decode_command import run_decode

    run_decode(
        output=output,
        lengths=lengths,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block=block,
        window=window,
        sinks=sinks,
        topk=topk,
        layers=layers,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )
