"""SparseK's kernels on a CUDA device: the selection bit for bit, attention by its fp64 oracle, every configuration."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import FLOOR, make_inputs, worst_error
from sparsetrain_kernels import (
    CausalSelection,
    causal_attention,
    causal_sparsek,
    selected_attention,
    selected_attention_dense,
    sparsek,
    sparsek_attention,
)
from sparsetrain_kernels.causal_selection import topk_statistics
from sparsetrain_kernels.score_placement import document_positions, place_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
GATES = ("value", "log", "straight")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NAMES = ("out", "grad query", "grad key", "grad value", "grad scores", "grad threshold")


def random_scores(heads: int, tokens: int, kind: str = "normal", seed: int = 3) -> torch.Tensor:
    normal = torch.randn(1, heads, tokens, generator=torch.Generator().manual_seed(seed))
    ramp = torch.arange(tokens) * 1e-3
    kinds = {
        "normal": normal,
        "quarters": (normal * 4).round() / 4,
        "ramp": ramp + 0.1 * normal,
        "constant": 0 * normal,
    }
    return kinds[kind].cuda()


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("kind", ["normal", "quarters", "ramp", "constant"])
@pytest.mark.parametrize(
    ("tokens", "topk", "window", "sinks"), [(3, 1, 1, 0), (5000, 300, 64, 4), (70_000, 1024, 512, 4)]
)
def test_selection_is_that_of_the_reference_bit_for_bit(kind, tokens: int, topk: int, window: int, sinks: int) -> None:
    scores = random_scores(2, tokens, kind)
    for cu_seqlens in (None, packed(0, 1, tokens // 3, tokens // 3, tokens)):
        options = {"sinks": sinks, "cu_seqlens": cu_seqlens}
        actual = causal_sparsek(scores, topk, window, **options, backend="triton")
        expected = causal_sparsek(scores, topk, window, **options, backend="reference")
        for name, ours, plain in zip(CausalSelection._fields, actual, expected, strict=True):
            assert torch.equal(ours, plain), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entries", [1, 100, 5000, 100_000])
def test_projection_equals_sorting_in_fp64(entries: int, dtype: torch.dtype) -> None:
    z = torch.randn(7, entries, generator=torch.Generator().manual_seed(0)).to(dtype).cuda().requires_grad_()
    k = min(0.6 * entries, 500.5)
    exact = z.detach().double().requires_grad_()
    p, want = sparsek(z, k, backend="triton"), sparsek(exact, k, backend="reference")
    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda()
    (grad_z,) = torch.autograd.grad(p, z, grad.to(dtype))
    (grad_exact,) = torch.autograd.grad(want, exact, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(p.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_z.double(), grad_exact, rtol=tolerance, atol=tolerance)


def case(heads=(4, 2), tokens=1500, head_dim=128, dtype=torch.bfloat16, topk=200, window=130, sinks=4, **more):
    """Leaves query, key, value, scores and threshold, and all else that selected_attention takes."""
    tensors = make_inputs(*heads, tokens, head_dim=head_dim, dtype=dtype, device="cuda")
    scores = random_scores(more.pop("selections", heads[1]), tokens) * 0.5
    options = {"topk": topk, "window": window, "sinks": sinks, "gate": "value", "cu_seqlens": None, **more}
    selection = causal_sparsek(scores, topk, window, sinks=sinks, cu_seqlens=options["cu_seqlens"])
    return [*tensors, scores, selection.threshold], selection.exit, options


def results(attention, leaves, exit, options, dtype=None, **more) -> list[torch.Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = [t.detach().to(dtype or t.dtype) for t in leaves[:3]] + [t.detach().to(wide) for t in leaves[3:]]
    cast = [t.requires_grad_() for t in cast]
    out = attention(*cast, exit, **options, **more)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, cast, grad)]


def backends(query: torch.Tensor) -> list[str]:
    """Those that take it here."""
    gluon = HOPPER and query.dtype != torch.float32 and query.shape[3] in (64, 128)
    return ["triton", "gluon"] if gluon else ["triton"]


def assert_equals_the_definition(leaves, exit, options) -> None:
    """Within twice the error that the definition itself makes in the dtype, both measured against fp64."""
    exact = results(selected_attention_dense, leaves, exit, options, torch.float64)
    eager = results(selected_attention_dense, leaves, exit, options)
    for backend in backends(leaves[0]):
        actual = results(selected_attention, leaves, exit, options, backend=backend)
        again = results(selected_attention, leaves, exit, options, backend=backend)
        for name, ours, repeat, yardstick, truth in zip(NAMES, actual, again, eager, exact, strict=True):
            assert torch.equal(ours, repeat), f"{backend}: {name} differs from run to run"
            if not truth.any():
                assert not ours.any(), f"{backend}: {name} is zero"
                continue
            limit = max(2 * worst_error(yardstick, truth), FLOOR[leaves[0].dtype])
            error = worst_error(ours, truth)
            assert error <= limit, f"{backend}: {name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_configuration_equals_the_definition(dtype: torch.dtype, head_dim: int, gate: str) -> None:
    assert_equals_the_definition(*case(dtype=dtype, head_dim=head_dim, gate=gate))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_single_precision_equals_the_definition(head_dim: int) -> None:
    assert_equals_the_definition(*case(dtype=torch.float32, head_dim=head_dim, tokens=700))


@pytest.mark.parametrize("heads", [(2, 2), (8, 1), (7, 1), (8, 4)])
@pytest.mark.parametrize("gate", GATES)
def test_every_group_packed_equals_the_definition(heads, gate: str) -> None:
    bounds = packed(0, 1, 120, 376, 376, 1100, 2177)
    assert_equals_the_definition(*case(heads, 2177, cu_seqlens=bounds, gate=gate))
    assert_equals_the_definition(*case(heads, 2177, cu_seqlens=bounds, gate=gate, selections=1))


@pytest.mark.parametrize(("tokens", "topk", "window", "sinks"), [(2, 1, 1, 0), (100, 8, 200, 4), (5000, 64, 1, 0)])
def test_extreme_budgets_equal_the_definition(tokens: int, topk: int, window: int, sinks: int) -> None:
    assert_equals_the_definition(*case(tokens=tokens, topk=topk, window=window, sinks=sinks))


def test_keys_of_several_stretches_are_summed() -> None:
    # Sinks and the best keys live through all of 9,000 rows, five stretches of the backward pass.
    assert_equals_the_definition(*case(tokens=9000, topk=1024, window=512))


def test_enough_places_for_all_is_dense_attention() -> None:
    query, key, value = make_inputs(4, 2, 1300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    out = sparsek_attention(query, key, value, random_scores(2, 1300), 1300, 10, backend="triton")
    torch.testing.assert_close(out, causal_attention(query, key, value), rtol=1.6e-2, atol=1.6e-2)


def test_a_moved_exit_is_noticed() -> None:
    leaves, exit, options = case()
    exact = results(selected_attention_dense, leaves, exit, options, torch.float64)
    for backend in backends(leaves[0]):
        moved = results(selected_attention, leaves, exit - 100, options, backend=backend)
        assert worst_error(moved[0], exact[0]) > 1e-2


def test_nothing_waits_for_the_device() -> None:
    leaves, _, options = case(cu_seqlens=packed(0, 700, 1500))
    query, key, value, scores, _ = leaves
    scores = scores.detach().requires_grad_()
    budget = (options["topk"], options["window"], options["sinks"])

    def step() -> None:
        out = sparsek_attention(query, key, value, scores, *budget, cu_seqlens=options["cu_seqlens"])
        out.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_beyond_the_tensors_is_linear_with_a_small_constant() -> None:
    from sparsetrain_kernels.selected_keys.triton.launch import PARTIAL_BYTES

    peaks = []
    for tokens in (32_768, 65_536):
        leaves, exit, options = case((32, 8), tokens, topk=1024, window=1024)
        out = selected_attention(*leaves[:3], leaves[3].requires_grad_(), leaves[4], exit, **options)
        grad = torch.randn_like(out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, [*leaves[:3], leaves[3]], grad)
        held = sum(t.numel() * t.element_size() for t in grads)
        peaks.append(torch.cuda.max_memory_allocated() - before - held)
        del leaves, out, grad, grads
    # Partial sums are bounded by themselves; lists and statistics of rows are a few hundred bytes a token and KV head.
    assert peaks[1] < 2.2 * peaks[0]
    assert (peaks[1] - PARTIAL_BYTES) / (65_536 * 8) < 1000


@pytest.mark.parametrize("tokens", [1, 5000, 70_000])
def test_placement_of_scores_is_that_of_plain_pytorch(tokens: int) -> None:
    for cu_seqlens in (None, packed(0, 1, tokens // 3, tokens // 3, tokens) if tokens > 1 else None):
        places, found = document_positions(tokens, cu_seqlens, torch.device("cuda")), []
        linear = (3 * random_scores(2, tokens).mT.contiguous().mT + 7).requires_grad_()
        gain = torch.tensor([0.5, 1.5], device="cuda", requires_grad=True)
        for backend in ("triton", "triton", "reference"):
            scores, moments = place_scores(linear, gain[:, None].expand_as(linear), places, 1e-4, backend=backend)
            grad = random_scores(2, tokens, seed=4)
            found.append([scores.detach(), *moments, *torch.autograd.grad(scores, (linear, gain), grad)])
        for ours, again, plain in zip(*found, strict=True):
            assert torch.equal(ours, again)
            # The reference subtracts running sums of the whole row; the gain's gradient is a sum over all tokens.
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
        near = torch.isclose(found[0][0], found[2][0], rtol=2.0**-22, atol=2.0**-22)
        assert near.float().mean() > 0.999


@pytest.mark.parametrize("tokens", [3, 5000, 70_000])
def test_gradient_and_statistics_of_the_selection_are_those_of_plain_pytorch(tokens: int) -> None:
    scores, cu_seqlens = random_scores(8, tokens), packed(0, 1, tokens // 3, tokens)
    topk, window = max(1, tokens // 20), 16
    selection = causal_sparsek(scores, topk, window, sinks=4, cu_seqlens=cu_seqlens)
    intervals = (selection.interior_start, selection.interior_end, selection.interior_size)
    grad = random_scores(8, tokens, seed=4)
    gradients, statistics = [], []
    for backend in ("triton", "reference"):
        gradients.append(torch.ops.sparsetrain.causal_sparsek_bwd(grad, *intervals, backend))
        statistics.append(topk_statistics(scores, selection, topk, window, 4, cu_seqlens, backend=backend))
    assert torch.equal(*gradients)
    for name, plain in statistics[1].items():
        torch.testing.assert_close(statistics[0][name], plain, rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")], ids=str)
def test_scores_that_are_no_numbers_are_sorted_as_on_the_host(wrong: float) -> None:
    """The sign of NaN is seen by CUDA's sort alone."""
    scores = random_scores(2, 3000, "quarters")
    scores[..., ::7] = wrong
    scores[..., 1::7] = -wrong
    for cu_seqlens in (None, packed(0, 1, 900, 900, 3000)):
        host = None if cu_seqlens is None else cu_seqlens.cpu()
        expected = causal_sparsek(scores.cpu(), 100, 16, sinks=4, cu_seqlens=host, backend="reference")
        for backend in ("triton", "reference"):
            actual = causal_sparsek(scores, 100, 16, sinks=4, cu_seqlens=cu_seqlens, backend=backend)
            for name, ours, plain in zip(CausalSelection._fields, actual, expected, strict=True):
                assert torch.equal(ours.cpu().nan_to_num(nan=7e7), plain.nan_to_num(nan=7e7)), (backend, name)
