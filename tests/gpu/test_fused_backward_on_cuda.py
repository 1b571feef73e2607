"""The fused backward kernel of Hopper: it equals the fp64 oracle and the two kernels in its place, and repeats bit for
bit however its work is cut up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_oracle import assert_matches_oracle, make_inputs, outputs_and_gradients
from sparsetrain_kernels import block_pattern_attention, block_pattern_attention_dense

from sparsetrain.patterns import DilatedPattern, DistancePattern, FullPattern, LongNetPattern, PowerPattern

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper device"),
    pytest.mark.usefixtures("poisoned"),
]

POWER = PowerPattern(128, 2, 1)
PER_HEAD = LongNetPattern(128, ((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=4)
inputs = partial(make_inputs, device="cuda", dtype=torch.bfloat16, head_dim=128)


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.block_pattern.hopper import fused_launch

    monkeypatch.setattr(fused_launch, "LEAST_ROWS", 0)


def attention(pattern, workspace: int = 2**31):
    return partial(block_pattern_attention, pattern=pattern, return_lse=True, backend="gluon", workspace=workspace)


def oracle(pattern):
    return partial(block_pattern_attention_dense, pattern=pattern)


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        POWER,
        PowerPattern(256, 5, 1),
        FullPattern(128),
        DilatedPattern(128, 3, 2),
        PER_HEAD,
        DistancePattern(128, (0, 3), 2),
    ],
    ids=repr,
)
def test_equals_the_oracle(pattern, dtype: torch.dtype) -> None:
    tensors = inputs(8, 4, 2177, dtype=dtype)
    for cu_seqlens in (None, packed(0, 1, 120, 376, 376, 1500, 2177)):
        assert_matches_oracle(attention(pattern), oracle(pattern), tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("pattern", [POWER, PER_HEAD], ids=repr)
def test_any_workspace_gives_the_same_bits(pattern) -> None:
    tensors = inputs(8, 4, 1300, batch=2)
    whole = outputs_and_gradients(attention(pattern), tensors)
    one_head = 4 * 2 * 1300 * 128
    for heads in (1, 3, 4):
        part = outputs_and_gradients(attention(pattern, heads * one_head), tensors)
        assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    none = outputs_and_gradients(attention(pattern, 0), tensors)
    *same, query, key, value = zip(whole, none, strict=True)
    assert all(torch.equal(a, b) for a, b in (*same, key, value))
    assert (query[0] - query[1]).float().norm() < 1e-3 * query[1].float().norm()


def test_a_workspace_bounds_what_is_allocated() -> None:
    tensors = inputs(8, 4, 4096)

    def peak(workspace: int) -> int:
        out, _ = attention(POWER, workspace)(*tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        return torch.cuda.max_memory_allocated() - before

    sums = 4 * 8 * 4096 * 128
    assert peak(sums) - peak(sums // 4) > 0.7 * sums


def test_split_sinks_equal_the_oracle() -> None:
    tensors = inputs(2, 1, 9000)
    assert_matches_oracle(attention(POWER), oracle(POWER), tensors)
    assert_matches_oracle(attention(POWER), oracle(POWER), tensors, cu_seqlens=packed(0, 300, 5000, 9000))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_any_scale_equals_the_oracle(scale: float) -> None:
    assert_matches_oracle(attention(POWER), oracle(POWER), inputs(4, 2, 700), scale=scale)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_saturated_rows_and_wild_channels_equal_the_oracle(place: int) -> None:
    for factor in (12.0, torch.tensor([30.0] + [1.0] * 127, device="cuda")):
        tensors = inputs(4, 2, 1500)
        with torch.no_grad():
            tensors[place].mul_(factor)
        assert_matches_oracle(attention(POWER), oracle(POWER), tensors)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22])
def test_gradients_of_any_size_scale_with_it(size: float) -> None:
    query, key, value = inputs(4, 2, 1500)
    out, _ = attention(POWER)(query, key, value)
    cotangent = torch.randn_like(out)
    factor = 2.0 ** torch.tensor(size).log2().round().item()
    normal = torch.autograd.grad(out, (query, key, value), cotangent, retain_graph=True)
    other = torch.autograd.grad(out, (query, key, value), cotangent * factor)
    for a, b in zip(normal, other, strict=True):
        assert (a.double() - b.double() / factor).norm() < 1e-3 * a.double().norm()


@pytest.mark.parametrize(("place", "value"), [(0, "nan"), (1, "nan"), (1, "inf"), (2, "nan"), (2, "inf")])
def test_what_is_no_number_reaches_what_it_reaches_through_two_kernels(place: int, value: str) -> None:
    tensors = inputs(4, 2, 1500)
    cotangent = torch.randn_like(tensors[0])
    with torch.no_grad():
        tensors[place][0, 1, 700, 5] = float(value)
    finite = []
    for workspace in (2**31, 0):
        out, _ = attention(POWER, workspace)(*tensors)
        grads = torch.autograd.grad(out, tensors, cotangent)
        finite.append([grad.isfinite().all(-1) for grad in grads])
    own = slice(640, 768)  # the tile on the diagonal, in which a little more may be lost, and nothing found
    for fused, two in zip(*finite, strict=True):
        assert not (fused & ~two).any()
        fused[:, :, own] = two[:, :, own]
        assert torch.equal(fused, two)


def test_unlisted_keys_never_matter() -> None:
    query, key, value = inputs(4, 2, 1280)
    rows = slice(1152, 1280)
    cotangent = torch.zeros_like(query)
    cotangent[:, :, rows] = 1
    grads = []
    for change in (0.0, 3.0, float("nan")):
        with torch.no_grad():
            for j in set(range(9)) - set(POWER.key_blocks(9)):
                key[:, :, j * 128 : j * 128 + 128] += change
                value[:, :, j * 128 : j * 128 + 128] += change
        out, _ = attention(POWER)(query, key, value)
        grads.append(torch.autograd.grad(out, query, cotangent)[0][:, :, rows])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_runs_repeat_bit_for_bit_while_the_card_is_busy() -> None:
    tensors = tuple(tensor.detach() for tensor in inputs(8, 2, 9000))
    first = outputs_and_gradients(attention(PowerPattern()), tensors)
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for _ in range(30):
        with torch.cuda.stream(side):
            for _ in range(torch.randint(1, 6, ()).item()):
                noise @ noise
        again = outputs_and_gradients(attention(PowerPattern()), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.cuda.synchronize()
