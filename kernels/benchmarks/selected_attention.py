"""Time of each kernel of SparseK's attention, without the selection, on a GPU, by PyTorch's profiler."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from typing import Any

import torch
from sparsetrain_kernels import causal_sparsek, selected_attention
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

HEADS, KV_HEADS, HEAD_DIM, SINKS = 32, 8, 128, 4
DEVIATION = 0.7
"""Of the scores, which are normal and alike for all tokens."""
REPEATS = 3


def problem(tokens: int, budget: int) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, scores and threshold, which have gradients, and the keys' exits."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    tensors = [
        normal(1, tokens, heads, HEAD_DIM).bfloat16().transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    scores = DEVIATION * normal(1, KV_HEADS, tokens)
    selection = causal_sparsek(scores, budget, budget, sinks=SINKS)
    return [*tensors, scores.requires_grad_(), selection.threshold.requires_grad_()], selection.exit


def measure(tokens: int, budget: int, gate: str, rounds: int) -> None:
    """Print the best time of each kernel, forward and backward, for either backend."""
    leaves, exit = problem(tokens, budget)
    options: dict[str, Any] = {"window": budget, "topk": budget, "sinks": SINKS, "gate": gate}
    grad = torch.randn_like(leaves[0])

    def call(backend: str) -> None:
        query, key, value, scores, threshold = leaves
        out = selected_attention(query, key, value, scores, threshold, exit, backend=backend, **options)
        torch.autograd.grad(out, leaves, grad)

    found: dict[str, list[Counter[str]]] = {"triton": [], "gluon": []}
    for _ in range(rounds):
        for backend in random.sample(list(found), len(found)):
            call(backend)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as events:
                for _ in range(REPEATS):
                    call(backend)
                torch.cuda.synchronize()
            times = {event.key: event.self_device_time_total / REPEATS / 1e3 for event in events.key_averages()}
            found[backend].append(Counter({name: time for name, time in times.items() if time > 0.02}))
    print(f"{tokens:,} tokens, topk = window = {budget}, gate {gate}, milliseconds:")
    for backend, turns in found.items():
        best = min(turns, key=Counter.total)
        print(
            f"  {backend} {best.total():.2f} = " + ", ".join(f"{name[:40]} {time:.2f}" for name, time in best.items())
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--budget", type=int, default=1024, help="topk, and the window")
    parser.add_argument("--gate", default="value")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this needs a CUDA device\n")
    print(torch.cuda.get_device_name())
    for tokens in map(int, options.lengths.split(",")):
        measure(tokens, options.budget, options.gate, options.rounds)


if __name__ == "__main__":
    main()
