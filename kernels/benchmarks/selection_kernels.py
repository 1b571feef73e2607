"""Time of each kernel of top-p selection and of attention over its lists, on a GPU, by PyTorch's profiler."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sparsetrain_kernels import listed_decode, top_p_lists
from torch.profiler import ProfilerActivity, profile

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 256
CACHES = 3
"""Scores and caches that are read in turn."""
ALWAYS: dict[str, Any] = {"sinks": 4, "recent": 64}


def kernel_times(call: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Microseconds of each kernel in a call."""
    for index in range(CACHES):
        call(index)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for index in range(repeats):
            call(index)
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.key.endswith("_kernel")]
    return {event.key: event.self_device_time_total / repeats for event in kernels}


def measure(batch: int, tokens: int, p: float, spread: float, repeats: int) -> None:
    """Print the times for ``batch`` sequences of ``tokens`` keys whose logits have this standard deviation."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    shape = (batch, HEADS, tokens)
    scores = [(torch.randn(shape, device=device) * spread).half() for _ in range(CACHES)]
    sums = [each.float().logsumexp(-1) for each in scores]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    pages = torch.randn(2, batch * tokens // PAGE, KV_HEADS, PAGE, HEAD_DIM, device=device, dtype=torch.bfloat16)
    caches = [pages.clone() for _ in range(CACHES)]
    table = torch.randperm(batch * tokens // PAGE, device=device).view(batch, -1).to(torch.int32)
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
    room = max(8192, tokens // 4)
    options: dict[str, Any] = {"lengths": lengths, "num_kv_heads": KV_HEADS, "capacity": room, "min_keys": 64, **ALWAYS}

    def select(index: int) -> object:
        return top_p_lists(scores[index % CACHES], sums[index % CACHES], p, **options)

    chosen = top_p_lists(scores[0], sums[0], p, **options)

    def attend(index: int) -> object:
        key, value = caches[index % CACHES]
        lists, counts = chosen.lists, chosen.counts
        return listed_decode(query, key, value, lists, counts, lengths=lengths, block_table=table, **ALWAYS)

    kept = chosen.counts.float().mean().item() / tokens
    print(f"{batch} x {tokens:,} keys, {kept:.2%} kept, microseconds:")
    for name, times in (("selection", kernel_times(select, repeats)), ("attention", kernel_times(attend, repeats))):
        each = ", ".join(f"{kernel} {time:.1f}" for kernel, time in times.items())
        print(f"  {name} {sum(times.values()):.1f} = {each}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--p", type=float, default=0.9)
    parser.add_argument("--spread", type=float, default=3.8, help="standard deviation of the logits")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this needs a CUDA device\n")
    print(torch.cuda.get_device_name())
    for batch, tokens in ((8, 32768), (1, 131072), (8, 131072)):
        measure(batch, tokens, options.p, options.spread, options.repeats)


if __name__ == "__main__":
    main()
