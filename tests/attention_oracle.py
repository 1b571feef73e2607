"""How an attention operation is compared with its oracle: forward and gradients, by the error that the dtype makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[..., tuple[Tensor, Tensor]]
NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad sink_logits")
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def make_inputs(
    query_heads: int,
    kv_heads: int,
    rows: int,
    keys: int | None = None,
    *,
    batch: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, laid out as models have them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, tokens: int) -> Tensor:
        tensor = torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        return tensor.to(device, dtype).transpose(1, 2).requires_grad_()

    keys = keys or rows
    return random(query_heads, rows), random(kv_heads, keys), random(kv_heads, keys)


def outputs_and_gradients(attention: Attention, tensors: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """``out``, ``lse`` and the gradients of query, key, value[, sink_logits] under fixed random cotangents."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if len(leaves) == 4:
        options["sink_logits"] = leaves[3]
    out, lse = attention(*leaves[:3], **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, cotangents)]


def worst_error(actual: Tensor, exact: Tensor, rows: int = 16) -> float:
    """The largest relative RMS error of any ``rows`` consecutive rows of any head, and of the whole."""
    assert actual.shape == exact.shape
    actual = actual.double()
    assert actual.isfinite().all()
    if exact.dim() < 3:
        parts = [(actual, exact)]
    else:
        parts = list(zip(actual.split(rows, dim=2), exact.split(rows, dim=2), strict=True))
    whole = exact.square().mean().sqrt()
    # A block of tiny gradients (the last keys of a sequence) is measured against a tenth of the whole's size.
    errors = [(a - e).square().mean().sqrt() / e.square().mean().sqrt().maximum(0.1 * whole) for a, e in parts]
    return float(max(errors))


def assert_matches_oracle(
    attention: Attention, oracle: Attention, tensors: tuple[Tensor, ...], **options: object
) -> None:
    """Within twice the error that the oracle itself makes in the tensors' dtype, both measured against fp64."""
    exact = outputs_and_gradients(oracle, tuple(tensor.double() for tensor in tensors), **options)
    eager = outputs_and_gradients(oracle, tensors, **options)
    actual = outputs_and_gradients(attention, tensors, **options)
    for name, ours, yardstick, truth in zip(NAMES, actual, eager, exact):
        limit = max(2 * worst_error(yardstick, truth), FLOOR[tensors[0].dtype])
        assert worst_error(ours, truth) <= limit, f"{name}: {worst_error(ours, truth):.2e} > {limit:.2e}"
