"""Time of dense attention in a sliding window over packed documents: torch's fused operation beside our tiles.

python kernels/benchmarks/packed_windows.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from sparsetrain_kernels import causal_attention

TOKENS, DOCUMENT, WINDOW, HEADS, KV_HEADS, WIDTH = 32768, 512, 128, 8, 2, 64
REPEATS = 5


def main() -> None:
    """Print the median time of forward and backward of each, in ms."""
    inputs = [
        torch.randn(1, heads, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    bounds = torch.arange(0, TOKENS + 1, DOCUMENT, device="cuda", dtype=torch.int32)

    # The log of the denominator is what the fused operation does not give.
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "fused": lambda: causal_attention(*inputs, window=WINDOW, cu_seqlens=bounds),
        "tiles": lambda: causal_attention(*inputs, window=WINDOW, cu_seqlens=bounds, return_lse=True)[0],
    }
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {TOKENS:,} tokens, documents of {DOCUMENT}"
    )
    print(f"window {WINDOW}, {HEADS} query and {KV_HEADS} KV heads of {WIDTH}")
    for name, way in ways.items():
        times = []
        for _ in range(1 + REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            way().sum().backward()
            torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        print(f"{name}: {sorted(times[1:])[REPEATS // 2]:.2f} ms, forward and backward")


if __name__ == "__main__":
    main()
