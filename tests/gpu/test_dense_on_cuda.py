"""Full attention on a CUDA device: the fused paths against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels import causal_attention, causal_attention_dense

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [[257], [1, 130, 64, 512]], ids=["one", "packed"])
@pytest.mark.parametrize("heads", [(6, 3, 32), (8, 2, 128)], ids=["d32", "d128"])
@pytest.mark.parametrize("window", [None, 2, 100])
def test_fused_attention_equals_the_oracle(
    lengths: list[int], heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    query_heads, kv_heads, head_dim = heads
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = sum(lengths)
    inputs = [
        torch.randn(1, count, tokens, head_dim, device="cuda", generator=generator).to(dtype).requires_grad_()
        for count in (query_heads, kv_heads, kv_heads)
    ]
    weight = torch.randn(1, query_heads, tokens, head_dim, device="cuda", generator=generator)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int() if len(lengths) > 1 else None
    out = causal_attention(*inputs, window=window, cu_seqlens=cu_seqlens)
    gradients = torch.autograd.grad((out.float() * weight).sum(), inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, _ = causal_attention_dense(*exact, window=window, cu_seqlens=cu_seqlens)
    expected_gradients = torch.autograd.grad((expected * weight.double()).sum(), exact)
    limit = 1e-5 if dtype == torch.float32 else 1.5e-2
    for got, want in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        assert ((got.double() - want).norm() / want.norm()).item() < limit
