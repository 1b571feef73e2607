"""Gradients repeat bit for bit while another process keeps the card busy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from attention_oracle import make_inputs
from sparsetrain_kernels import block_pattern_attention, sparsek_attention
from torch import Tensor

from sparsetrain.patterns import PowerPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned", "loaded_card"),
]
REPEATS = 500
LOAD = """
import random, time, torch
sizes = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (512, 2048, 4096)]
print("ready", flush=True)
while True:
    for _ in range(random.randrange(20)):
        each = random.choice(sizes)
        each @ each
    torch.cuda.synchronize()
    time.sleep(random.random() * 2e-3)
"""


@pytest.fixture
def loaded_card() -> Iterator[None]:
    """Another process multiplies matrices of several sizes, with pauses."""
    with subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
            assert process.poll() is None
        finally:
            process.kill()


def power(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    out = block_pattern_attention(query, key, value, PowerPattern())
    return out, *torch.autograd.grad(out, (query, key, value), query.detach())


def sparsek(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    out = sparsek_attention(query, *others, 512, 512, 4)
    return out, *torch.autograd.grad(out, (query, *others), query.detach())


@pytest.mark.parametrize("attend", [power, sparsek])
def test_five_hundred_runs_have_the_same_bits(attend: Callable[..., tuple[Tensor, ...]]) -> None:
    # Enough heads and tokens for the fused backward kernel, with its sums in memory.
    tensors = make_inputs(32, 8, 8192 + 77, head_dim=128, dtype=torch.bfloat16, device="cuda")
    scores = torch.randn(1, 8, tensors[0].shape[2], generator=torch.Generator().manual_seed(5)).cuda()
    run = partial(attend, *tensors, scores.requires_grad_())
    first = run()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
