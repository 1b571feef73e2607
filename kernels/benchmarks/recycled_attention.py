"""Times attention where each segment of rows reads the keys that the row before it chose, beside dense attention.

    python kernels/benchmarks/recycled_attention.py [TOKENS:SEGMENT:KEYS ...]    # on a CUDA device

For each case (32768:16:1024 and 131072:32:2048 unless given): milliseconds of each part of a forward and backward pass
in bf16, 32 query and 8 KV heads of 128; of the whole through autograd, with the peak of what it allocates beside
inputs, outputs and gradients; and of torch's attention by cuDNN. Queries and keys are random, so that neighbouring
lists share little. TFLOP/s count the pairs of a row and a key it sees, the backward pass 2.5 times as much as the
forward one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from sparsetrain_kernels import causal_attention, listed_attention, put_rows, take_rows, top_k_keys
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median of some runs after a first one."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Case:
    """Tensors, segments, and the operations on them."""

    def __init__(self, tokens: int, segment: int, keys: int) -> None:
        self.tokens, self.segment, self.keys = tokens, segment, keys
        torch.manual_seed(0)
        random = lambda heads: torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.query, self.key, self.value = (random(heads).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.grad = random(HEADS).transpose(1, 2)
        self.starts = torch.arange(0, tokens, segment, dtype=torch.int32, device="cuda")
        self.bounds = torch.arange(0, tokens + 1, segment, dtype=torch.int32, device="cuda")
        self.skip = torch.ones_like(self.starts)

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in (self.query, self.key, self.value)]

    def start_rows(self, query: Tensor) -> Tensor:
        return query[:, :, :: self.segment]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The whole: the first row of each segment over all keys, the others over what it chose."""
        starts = self.starts.long()
        query, rows = take_rows(query, starts)
        full, lse = causal_attention(rows, key, value, query_positions=self.starts, return_lse=True)
        chosen = top_k_keys(rows, key, lse, self.keys, query_positions=self.starts)
        out = listed_attention(query, key, value, chosen.lists, chosen.counts, self.bounds, skip=self.skip)
        return put_rows(out, starts, full)

    def parts(self) -> dict[str, Callable[[], object]]:
        rows = self.start_rows(self.query)
        _, lse = causal_attention(rows, self.key, self.value, query_positions=self.starts, return_lse=True)
        chosen = top_k_keys(rows, self.key, lse, self.keys, query_positions=self.starts)
        listed_behind = partial(
            listed_attention,
            lists=chosen.lists,
            counts=chosen.counts,
            cu_segments=self.bounds,
            skip=self.skip,
        )
        dense, listed = self.leaves(), self.leaves()
        dense[0] = rows.detach().requires_grad_()
        dense_out = causal_attention(*dense, query_positions=self.starts)
        listed_out = listed_behind(*listed)
        own_grad = self.start_rows(self.grad)
        return {
            "starts, forward": lambda: causal_attention(
                rows, self.key, self.value, query_positions=self.starts, return_lse=True
            ),
            "choice": lambda: top_k_keys(rows, self.key, lse, self.keys, query_positions=self.starts),
            "lists, forward": lambda: listed_behind(self.query, self.key, self.value),
            "starts, backward": lambda: torch.autograd.grad(dense_out, dense, own_grad, retain_graph=True),
            "lists, backward": lambda: torch.autograd.grad(listed_out, listed, self.grad, retain_graph=True),
        }

    def whole(self, attend: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = self.leaves()
        return lambda: torch.autograd.grad(attend(*leaves), leaves, self.grad)

    def teraflops(self) -> dict[str, float]:
        """Of the forward pass: of the starts, and of the rows behind them."""
        unit = 4 * HEAD_DIM * HEADS / 1e12
        starts = int((self.starts.long() + 1).sum())
        listed = sum(
            (self.segment - 1) * min(self.keys, start + 1) + self.segment * (self.segment - 1) // 2
            for start in range(0, self.tokens, self.segment)
        )
        return {"starts": unit * starts, "lists": unit * listed}


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def measure(case: Case) -> None:
    print(f"{case.tokens:,} tokens, segments of {case.segment}, {case.keys:,} keys", flush=True)
    work = case.teraflops()
    total = 0.0
    for name, run in case.parts().items():
        spent = milliseconds(run)
        total += spent
        what, _, direction = name.partition(", ")
        rate = f"{work[what] * (2.5 if direction == 'backward' else 1) / spent * 1e3:8.0f} TFLOP/s" if direction else ""
        print(f"  {name:18} {spent:9.2f} ms {rate}", flush=True)
    print(f"  {'sum':18} {total:9.2f} ms")
    ours = case.whole(case.attend)
    spent = milliseconds(ours)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours()
    # The output and three gradients are no extra.
    extra = torch.cuda.max_memory_allocated() - before - 2 * case.query.nbytes - 2 * case.key.nbytes
    print(f"  {'forward, backward':18} {spent:9.2f} ms, {extra / 2**30:.2f} GiB beside inputs, output and gradients")
    theirs = milliseconds(case.whole(dense))
    print(f"  {'cuDNN, dense':18} {theirs:9.2f} ms, {theirs / spent:.2f} times as long", flush=True)


if __name__ == "__main__":
    for given in sys.argv[1:] or ["32768:16:1024", "131072:32:2048"]:
        measure(Case(*map(int, given.split(":"))))
        torch.cuda.empty_cache()
