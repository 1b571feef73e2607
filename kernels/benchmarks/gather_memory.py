"""Time and peak memory of block-pattern attention, forward and backward, over gathered blocks on CPU."""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass

import torch
from sparsetrain_kernels import block_pattern_attention
from sparsetrain_kernels.block_pattern.pattern import block_lists
from sparsetrain_kernels.inputs import Document

GIB = 2**30


@dataclass(frozen=True)
class PowerBlocks:
    """PowerAttention's pattern (2503.03588): sinks, the nearest blocks, and those at distances of powers of two."""

    block: int
    window: int
    num_sinks: int

    per_head = False
    heads = range(1)
    period = 1

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        distances = {*range(self.window), *(1 << exponent for exponent in range(query_block.bit_length()))}
        listed = {query_block - distance for distance in distances if distance <= query_block}
        return tuple(sorted({*range(min(self.num_sinks, query_block + 1)), *listed}))


def peak_memory() -> float:
    """The most resident memory the process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="sequence length")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
    parser.add_argument("--head-dim", type=int, default=64, help="elements of a head")
    parser.add_argument("--block", type=int, default=256, help="tokens in a block")
    parser.add_argument("--window", type=int, default=5, help="nearest blocks")
    parser.add_argument("--sinks", type=int, default=1, help="first blocks")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of query, key and value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pattern = PowerBlocks(args.block, args.window, args.sinks)
    query, key, value = (
        torch.randn(1, heads, args.tokens, args.head_dim, dtype=getattr(torch, args.dtype), requires_grad=True)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    before = peak_memory()

    start = time.perf_counter()
    out = block_pattern_attention(query, key, value, pattern)
    forward = time.perf_counter()
    out.backward(torch.randn_like(out))
    end = time.perf_counter()

    blocks = -(-args.tokens // args.block)
    listed = max(len(pattern.key_blocks(block)) for block in range(blocks))
    pairs = block_lists(pattern, blocks, args.kv_heads).visible_pairs(Document(0, args.tokens, 0, 0))
    density = pairs / (args.tokens * (args.tokens + 1) // 2)
    print(f"{args.tokens} tokens, {pattern}: at most {listed} blocks a row, density {density:.4f}")
    print(f"forward {forward - start:.2f} s, backward {end - forward:.2f} s, {args.threads} threads")
    print(f"peak memory {peak_memory():.2f} GiB, of which {peak_memory() - before:.2f} GiB beyond the inputs")
    # The oracle keeps the mask, and at least the fp32 logits and weights for backward.
    mask, logits = args.tokens**2 / GIB, 2 * 4 * args.heads * args.tokens**2 / GIB
    print(f"the dense oracle would need {mask:.1f} GiB for its mask and {logits:.1f} GiB for logits and weights")


if __name__ == "__main__":
    main()
