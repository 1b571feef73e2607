"""The Triton and Gluon kernels on a CUDA device: every configuration equals the fp64 oracle, and FlexAttention."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_oracle import assert_matches_oracle, make_inputs, outputs_and_gradients, worst_error
from sparsetrain_kernels import block_pattern_attention, block_pattern_attention_dense, causal_attention_dense

from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import (
    DilatedPattern,
    DistancePattern,
    FullPattern,
    HeadDistancePattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]

BACKENDS = ["triton", pytest.param("gluon", marks=pytest.mark.skipif(not HOPPER, reason="needs a Hopper device"))]
POWER = PowerPattern(128, 2, 1)
PATTERNS = [
    POWER,
    PowerPattern(256, 1, 0),
    FullPattern(128),
    SlidingPattern(128, 2, 3),
    StridePattern(128, 2, 1, 3),
    DilatedPattern(128, 3, 2),
    LongNetPattern(128, ((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=2),
    DistancePattern(128, (0, 3), 2),
    HeadDistancePattern(128, ((0, 1, 8), (0, 1, 2, 4)), 1),
    PowerPattern(128, 1, 0, base=4),
    RulerPattern(128, 1, 1, keep=2, levels=3),
]
inputs = partial(make_inputs, device="cuda", dtype=torch.bfloat16)


def sparse(pattern, backend):
    return partial(block_pattern_attention, pattern=pattern, return_lse=True, backend=backend)


def oracle(pattern):
    return partial(block_pattern_attention_dense, pattern=pattern)


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block", [16, 48, 64, 128, 256])
def test_every_configuration_equals_the_oracle(block: int, head_dim: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and block not in (48, 128):
        pytest.skip("fp32 compiles for long; two blocks cover its configurations")
    pattern = PowerPattern(block, 2, 1)
    tensors = inputs(4, 2, 9 * block + 37, head_dim=head_dim, dtype=dtype)
    assert_matches_oracle(sparse(pattern, "triton"), oracle(pattern), tensors)
    if HOPPER and dtype != torch.float32 and head_dim in (64, 128) and block % 128 == 0:
        assert_matches_oracle(sparse(pattern, "gluon"), oracle(pattern), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_pattern_equals_the_oracle(pattern, backend: str) -> None:
    bounds = packed(0, 1, 120, 376, 376, 1500, 2177)
    for cu_seqlens in (None, bounds):
        tensors = inputs(4, 2, 2177, head_dim=64)
        assert_matches_oracle(sparse(pattern, backend), oracle(pattern), tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_every_group_of_heads_equals_the_oracle(group: int, backend: str) -> None:
    tensors = inputs(2 * group, 2, 900, head_dim=128, batch=2)
    assert_matches_oracle(sparse(POWER, backend), oracle(POWER), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 63, 127, 128, 129, 640, 1281])
def test_ragged_lengths_equal_the_oracle(rows: int, backend: str) -> None:
    assert_matches_oracle(sparse(POWER, backend), oracle(POWER), inputs(8, 4, rows, head_dim=128, batch=4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_sink_columns_equal_the_oracle(backend: str) -> None:
    tensors = inputs(2, 1, 9000, head_dim=64)
    assert_matches_oracle(sparse(POWER, backend), oracle(POWER), tensors)
    assert_matches_oracle(sparse(POWER, backend), oracle(POWER), tensors, cu_seqlens=packed(0, 300, 5000, 9000))


@pytest.mark.parametrize(("rows", "q_start"), [(1, None), (1, 700), (300, None), (300, 77)])
def test_queries_behind_a_cache_equal_the_oracle(rows: int, q_start) -> None:
    tensors = inputs(4, 2, rows, 1500, head_dim=128, batch=2)
    assert_matches_oracle(sparse(POWER, "triton"), oracle(POWER), tensors, q_start=q_start)


def test_soft_cap_scale_and_sink_logits_equal_the_oracle() -> None:
    tensors = (*inputs(4, 2, 1000, head_dim=64), torch.tensor([-5.0, 0.0, 3.0, 60.0], device="cuda").bfloat16())
    options = {"softcap": 1.5, "scale": 0.7}
    assert_matches_oracle(sparse(POWER, "triton"), oracle(POWER), tensors, **options)
    assert_matches_oracle(sparse(POWER, "auto"), oracle(POWER), tensors, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_window_is_dense_causal(backend: str) -> None:
    assert_matches_oracle(
        sparse(PowerPattern(128, 9, 0), backend), causal_attention_dense, inputs(4, 2, 1100, head_dim=128)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_comparison_notices_one_wrong_block(backend: str) -> None:
    shifted = DistancePattern(128, (0, 1, 2, 4, 7), 1)
    right = DistancePattern(128, (0, 1, 2, 4, 8), 1)
    with pytest.raises(AssertionError, match="out: "):
        assert_matches_oracle(sparse(shifted, backend), oracle(right), inputs(2, 1, 1280, head_dim=64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlisted_keys_never_matter(backend: str) -> None:
    query, key, value = inputs(4, 2, 1280, head_dim=128)
    rows = slice(1152, 1280)
    cotangent = torch.zeros_like(query)
    cotangent[:, :, rows] = 1
    clean = block_pattern_attention(query, key, value, POWER, backend=backend)
    grads = torch.autograd.grad(clean, (query, key, value), cotangent)
    listed = POWER.key_blocks(9)
    with torch.no_grad():
        for j in set(range(9)) - set(listed):
            key[:, :, j * 128 : j * 128 + 128] += 3
            value[:, :, j * 128 : j * 128 + 128] = -value[:, :, j * 128 : j * 128 + 128]
    changed = block_pattern_attention(query, key, value, POWER, backend=backend)
    assert torch.equal(clean[:, :, rows], changed[:, :, rows])
    again = torch.autograd.grad(changed, (query, key, value), cotangent)
    assert torch.equal(grads[0][:, :, rows], again[0][:, :, rows])
    for j in set(range(9)) - set(listed):
        assert (again[2][:, :, j * 128 : j * 128 + 128] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bit_for_bit(backend: str) -> None:
    tensors = tuple(t.detach() for t in inputs(8, 2, 9000, head_dim=128))
    first = outputs_and_gradients(sparse(PowerPattern(), backend), tensors)
    for _ in range(3):
        again = outputs_and_gradients(sparse(PowerPattern(), backend), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_like_the_one_before_equal_it_wherever_tensors_lie(backend: str) -> None:
    tensors = inputs(4, 2, 700, head_dim=128)
    expected = outputs_and_gradients(sparse(POWER, backend), tensors)
    for start in (0, 1, 0, 8):
        moved = []
        for tensor in tensors:
            storage = torch.empty(tensor.numel() + start, device="cuda", dtype=tensor.dtype)
            moved.append(storage[start:].view(tensor.shape).copy_(tensor.detach()).requires_grad_())
        again = outputs_and_gradients(sparse(POWER, backend), tuple(moved))
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_of_inputs_and_gradients_does_not_matter(backend: str) -> None:
    tensors = inputs(4, 2, 777, head_dim=128)
    copies = [t.detach().contiguous().requires_grad_() for t in tensors]
    out, same = (block_pattern_attention(*args, POWER, backend=backend) for args in (tensors, copies))
    assert torch.equal(out, same)
    expanded = torch.autograd.grad(out.sum(), tensors)
    full = torch.autograd.grad(same, copies, torch.ones(out.shape, device="cuda", dtype=out.dtype))
    assert all(torch.equal(a, b) for a, b in zip(expanded, full, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_of_flex_attention(backend: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern, length = PowerPattern(), 4096 + 300
    query, key, value = inputs(8, 2, length, head_dim=128)

    def visible(b, h, q, k):
        distance = q // 256 - k // 256
        return (q >= k) & ((k < 256) | (distance < 5) | ((distance & (distance - 1)) == 0))

    mask = create_block_mask(visible, None, None, length, length, device="cuda")
    theirs = torch.compile(flex_attention, dynamic=False)(query, key, value, block_mask=mask, enable_gqa=True)
    ours = block_pattern_attention(query, key, value, pattern, backend=backend)
    cotangent = torch.randn_like(ours)
    assert worst_error(ours.detach(), theirs.detach().double(), rows=128) < 8e-3
    for got, want in zip(
        torch.autograd.grad(ours, (query, key, value), cotangent),
        torch.autograd.grad(theirs, (query, key, value), cotangent),
        strict=True,
    ):
        assert worst_error(got, want.double(), rows=128) < 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_serves_many_lengths(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    attend = torch.compile(
        partial(block_pattern_attention, pattern=POWER, backend=backend), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (700, 1000, 1300, 2500):
        tensors = inputs(4, 2, length, head_dim=128)
        out = attend(*tensors)
        assert torch.equal(out, block_pattern_attention(*tensors, POWER, backend=backend))
        out.sum().backward()
    assert counter.frame_count == 1


def test_launches_on_the_device_of_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tensors = [t.detach().to("cuda:1").requires_grad_() for t in inputs(4, 2, 500, head_dim=128)]
    block_pattern_attention(*tensors, POWER).sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_more_than_2_to_the_31_elements(backend: str) -> None:
    heads, kv_heads, length, head_dim = 17, 1, 1_000_000, 128
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    torch.cuda.empty_cache()
    query, key, value = (
        torch.randn(1, length, count, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    assert query.numel() > 2**31
    pattern = PowerPattern()
    out = block_pattern_attention(query, key, value, pattern, backend=backend)
    cotangent = torch.zeros(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    tail = slice(length - 300, length)
    cotangent[:, :, tail] = torch.randn(1, heads, 300, head_dim, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(out, (query, key, value), cotangent)
    exact = [t.detach().float().requires_grad_() for t in (query[:, :, tail], key, value)]
    expected = block_pattern_attention(*exact, pattern, backend="reference")
    wanted = torch.autograd.grad(expected, exact, cotangent[:, :, tail].float())
    pairs = [(out[:, :, tail], expected), (grads[0][:, :, tail], wanted[0]), *zip(grads[1:], wanted[1:])]
    for got, want in pairs:
        difference = (got.detach().float() - want.detach()).norm() / want.detach().norm()
        assert difference < 5e-3
