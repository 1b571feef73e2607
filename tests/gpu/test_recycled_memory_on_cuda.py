"""What recycled attention allocates on a GPU: memory linear in the length, and no tensor of starts by keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from largest_allocation import on_cuda

from sparsetrain.methods.registry import parse_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EVERY = 4
SETTINGS: list[dict[str, Any]] = [{"keep": 32}, {"keep": 32, "p": 0.5}]


class Pass:
    """Forward and backward of one layer over ``length`` tokens, with few small heads."""

    def __init__(self, settings: dict[str, Any], length: int) -> None:
        self.method = parse_attention({"method": "recycled", "every": EVERY, **settings}).build(2)
        generator = torch.Generator("cuda").manual_seed(0)
        self.query, self.key, self.value = (
            torch.randn(1, heads, length, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
            for heads in (4, 2, 2)
        )

    def __call__(self) -> None:
        options = {"cu_seqlens": None, "q_start": None, "scale": None}
        out = self.method.attend(torch.nn.Module(), self.query, self.key, self.value, **options)
        torch.autograd.grad(out, (self.query, self.key, self.value), torch.ones_like(out))

    def extra(self) -> int:
        """Bytes at the peak above what the tensors take."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_memory_is_linear_in_the_length(settings: dict[str, Any]) -> None:
    Pass(settings, 2048)()  # compiles
    half, whole = (Pass(settings, length).extra() for length in (32768, 65536))
    assert whole <= 1.1 * 2 * half


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_there_is_no_tensor_of_starts_by_keys(settings: dict[str, Any]) -> None:
    length = 65536
    run = Pass(settings, length)
    run()
    found = on_cuda(run)
    # Logarithms of weights are fp16.
    assert run.query.nbytes <= found < 2 * length * (length // EVERY)
