"""Generation by a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from sparsetrain.bench.options import Count, Lengths, Suits, one_of
from sparsetrain.bench.options import Options as AnyOptions
from sparsetrain.errors import BenchError

if TYPE_CHECKING:
    from sparsetrain.bench.generating import GenerateCase

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
"""The shape without a GPU."""


class Options(AnyOptions):
    """Time generation with a model of Qwen3-8B's shape, random weights and each method's cache.

    A pass of the prompts, then greedy tokens: one step at a time, as a CUDA graph, by sparsetrain.generate with the
    host's work, and, where asked for, compiled. A pass that is not timed comes first. Models of sparsetrain are made
    ready for steps as sparsetrain generate does it, with Liger if it is installed.
    Queries are scaled so that few keys hold most of the weight; the share that was read is in the table.

    \b
    Examples:
      sparsetrain bench generate --lengths 32768 --batch 8 --ways dynamic,full,power
      sparsetrain bench generate --lengths 131072 --batch 8 --fill random --ways power,sliding,sparsek
      sparsetrain bench generate --layers 4 --output bench
    """

    lengths: Annotated[Lengths, Suits("32768,131072", "300")]
    """Tokens of a prompt, commas between."""
    batch: Annotated[Count, Suits(1, 2)]
    """Prompts."""
    layers: Annotated[Count, Suits(36, 3)]
    """Layers of the model."""
    new_tokens: Annotated[Count, Suits(64, 4)]
    """Tokens after each prompt that are timed in a CUDA graph, as many again by generate, and compiled."""
    compile: bool = False
    """Time steps that torch.compile made too, as generate runs them on a GPU; takes a minute for each way."""
    ways: str = "all"
    """dynamic and static (transformers with SDPA), full, power, sliding, sparsek, twilight, twilight-quest, quest,
    twilight-own (of power), channels (Double Sparsity), refresh (Twilight, a choice for 8 tokens), recycled (2,048
    keys for 32 tokens), hybrid (power with 2 dense layers in 7), hybrid-refresh. Commas between, or all."""
    fill: Annotated[str, one_of("prefill", "random")] = "prefill"
    """prefill: a pass of the prompts; random: the keys of random hidden states, at once and in less memory."""
    dtype: Annotated[str, one_of("bfloat16", "float16", "float32"), Suits("bfloat16", "float32")]
    """bfloat16, float16 or float32."""


def case(options: Options) -> GenerateCase:
    """The benchmark.

    Raises:
        BenchError: an option cannot be measured.
    """
    from sparsetrain.bench.contenders.writers import WAYS
    from sparsetrain.bench.generating import GenerateCase
    from sparsetrain.plan.shape import KNOWN_SHAPES

    known = {way.name: way for way in WAYS}
    names = list(known) if options.ways == "all" else list(dict.fromkeys(options.ways.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"--ways {unknown[0]}: there is no such way; choose from {', '.join(known)}, or all")
    if options.compile and options.device == "cpu":
        raise BenchError("--compile times steps as generate runs them on a GPU, and there is none; leave it out")
    config: dict[str, Any] = KNOWN_SHAPES["Qwen/Qwen3-8B"].as_config()
    if options.device == "cpu":
        config |= TINY | {"vocab_size": 256}
    config |= {"num_hidden_layers": options.layers, "max_position_embeddings": 2 * max(options.lengths) + 4096}
    return GenerateCase(
        name="generate",
        options=options,
        contenders=tuple(known[name] for name in names),
        known=WAYS,
        subject="Generation with Qwen3-8B's shape",
        config=config,
    )
