"""Causal attention, fused or tiled, equals its dense-mask oracle."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sparsetrain_kernels import causal_attention, causal_attention_dense, gather

PACKED = torch.tensor([0, 1, 12, 28, 28, 300], dtype=torch.int32)


def tiled(window=None):
    return partial(causal_attention, window=window, return_lse=True)


def oracle(window=None):
    return partial(causal_attention_dense, window=window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 40, 128, 129, 1000])
def test_equals_the_oracle_for_every_window(dtype, window, make_inputs, assert_matches_oracle) -> None:
    assert_matches_oracle(tiled(window), oracle(window), make_inputs(4, 2, 300, dtype=dtype))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    "options", [{"cu_seqlens": PACKED}, {"softcap": 1.5}, {"scale": 0.7, "softcap": 2.0, "cu_seqlens": PACKED}], ids=str
)
def test_equals_the_oracle_with_sink_logits(window, options, make_inputs, assert_matches_oracle) -> None:
    tensors = (*make_inputs(4, 2, 300), torch.tensor([-5.0, 0.0, 3.0, 60.0]))
    assert_matches_oracle(tiled(window), oracle(window), tensors, **options)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(("rows", "q_start"), [(1, None), (1, 40), (150, None), (5, 126), (300, 0)])
def test_equals_the_oracle_behind_a_cache(window, rows: int, q_start, make_inputs, assert_matches_oracle) -> None:
    tensors = make_inputs(4, 2, rows, 400, batch=2)
    assert_matches_oracle(tiled(window), oracle(window), tensors, q_start=q_start)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(300, {}), (300, {"cu_seqlens": PACKED, "scale": 0.7}), (1, {}), (1, {"q_start": 120}), (20, {"q_start": 0})],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_path_equals_the_oracle(rows: int, options, dtype, monkeypatch, make_inputs) -> None:
    tensors = make_inputs(4, 2, rows, 300, dtype=dtype)
    exact, _ = causal_attention_dense(*(t.double() for t in tensors), **options)
    # The tiled path cannot run without its plan.
    monkeypatch.delattr(gather, "_plan")
    out = causal_attention(*tensors, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(out.sum(), tensors)
    expected = torch.autograd.grad(exact.sum(), tensors)
    for grad, truth in zip(grads, expected, strict=True):
        assert (grad - truth).norm() <= tolerance * truth.norm()


def test_keys_outside_the_window_are_never_read(make_inputs, outputs_and_gradients) -> None:
    query, key, value = make_inputs(4, 2, 10, 400)
    clean = outputs_and_gradients(tiled(50), (query, key, value), q_start=300)
    with torch.no_grad():
        for tensor in (key, value):
            tensor[:, :, :251] = tensor[:, :, 310:] = float("nan")
    dirty = outputs_and_gradients(tiled(50), (query, key, value), q_start=300)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize(
    ("options", "tokens"), [({}, 4096), ({"window": 500}, 16384), ({"softcap": 3.0}, 2048)], ids=str
)
def test_no_square_tensor_is_built(options, tokens: int, monkeypatch, make_inputs, largest_tensor) -> None:
    monkeypatch.setattr(gather, "CHUNK_ELEMENTS", tokens * tokens // 20)
    tensors = make_inputs(2, 1, tokens, head_dim=8)
    assert largest_tensor(lambda: causal_attention(*tensors, **options).sum().backward()) < tokens * tokens / 5
