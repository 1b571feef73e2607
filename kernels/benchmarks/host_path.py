"""The host's part of a call, forward and backward: the best of some rounds of calls in a row that do not wait for the
GPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from gather_memory import PowerBlocks
from sparsetrain_kernels import block_pattern_attention, sparsek_attention
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BUDGET, SINKS = 1024, 4
"""Of SparseK: selected keys, which are as many as the window's, and first tokens."""
CALLS = 20
"""In a row: few enough for the queue of launches, which the host would wait for once it is full."""
ROUNDS = 8

PATTERN = PowerBlocks(256, window=5, num_sinks=1)


def power(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
    """PowerAttention."""
    return block_pattern_attention(query, key, value, PATTERN)


def sparsek(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
    """SparseK, the selection included."""
    return sparsek_attention(query, key, value, scores, BUDGET, BUDGET, SINKS)


OPERATIONS: dict[str, Callable[..., Tensor]] = {"power": power, "sparsek": sparsek}


def leaves(tokens: int) -> list[Tensor]:
    """Query, key, value and scores, which have gradients."""
    shapes = [(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [each.requires_grad_() for each in (*tensors, torch.randn(1, KV_HEADS, tokens, device="cuda"))]


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Time of the host for one of the calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / len(calls)


def measure(name: str, tokens: int) -> tuple[float, float]:
    """The best time of a forward call and of its backward pass, in microseconds."""
    inputs = leaves(tokens)
    used = inputs if name == "sparsek" else inputs[:3]
    gradient = torch.randn_like(inputs[0])
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(OPERATIONS[name](*inputs))

    def backward() -> None:
        torch.autograd.grad(outputs.pop(), used, gradient)

    for _ in range(3):  # compiles, and keeps what it can
        forward()
        backward()
    rounds = [(microseconds([forward] * CALLS), microseconds([backward] * CALLS)) for _ in range(ROUNDS)]
    return min(first for first, _ in rounds), min(last for _, last in rounds)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="2048,4096,8192")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this needs a CUDA device\n")
    print(f"{torch.cuda.get_device_name()}: microseconds of the host, forward and backward")
    for tokens in map(int, options.lengths.split(",")):
        for name in OPERATIONS:
            forward, backward = measure(name, tokens)
            print(f"  {tokens:>7,} tokens  {name:8} {forward:7.0f} {backward:7.0f}", flush=True)


if __name__ == "__main__":
    main()
