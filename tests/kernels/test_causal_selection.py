"""SPARSEK of every causal prefix: equal to sorting each prefix, and with the properties that training relies on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sparsek_oracle import Selection, covered, select
from sparsetrain_kernels import CausalSelection, causal_sparsek, sparsek
from sparsetrain_kernels.backend import INTERPRETING
from sparsetrain_kernels.causal_selection import crossing, topk_statistics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BOTH = ("reference", "triton")
SCORES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "narrow": lambda rng, n: 0.2 * rng.normal(size=n),
    "tiny": lambda rng, n: 1e-6 * rng.normal(size=n),
    "huge": lambda rng, n: 1e6 * rng.normal(size=n),
    "beyond 64 bits": lambda rng, n: 1e30 * rng.normal(size=n),
    "with an offset": lambda rng, n: 1e4 + rng.normal(size=n),
    "constant": lambda rng, n: np.full(n, 0.3),
    "rising slowly": lambda rng, n: 1e-3 * np.arange(n),
    "rising by ones": lambda rng, n: np.arange(n),
    "falling by ones": lambda rng, n: -np.arange(n),
    "three values": lambda rng, n: rng.integers(0, 3, size=n),
    "quarters": lambda rng, n: 0.25 * rng.integers(-3, 6, size=n),
    "zeros of both signs": lambda rng, n: rng.choice([0.0, -0.0], size=n),
}
LENGTHS = (0, 1, 2, 5, 17, 40)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or integers that no index may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_the_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of the kernels that needs no GPU."""
    skip = pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter, on machines without a GPU")
    return skip(pytest.mark.usefixtures("poisoned")(test))


def draw(kind: str, rng: np.random.Generator, *shape: int) -> Tensor:
    rows = [SCORES[kind](rng, shape[-1]) for _ in range(int(np.prod(shape[:-1])))]
    return torch.tensor(np.array(rows), dtype=torch.float32).view(shape)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def of_document(selection: CausalSelection, head: int, start: int, length: int) -> CausalSelection:
    """One document's part, its rows counted from its own start."""
    part = [tensor[0, head, start : start + length] for tensor in selection]
    return CausalSelection(part[0], *[rows - start for rows in part[1:4]], *part[4:])


def assert_equals_oracle(part: CausalSelection, oracle: Selection, scores: Tensor, window: int, sinks: int) -> None:
    length, exact, finite = len(scores), oracle.threshold, np.isfinite(oracle.threshold)
    threshold = part.threshold.double().numpy()
    np.testing.assert_array_equal(np.isfinite(threshold), finite)
    # Half a unit in the last place of fp32, and the rounding of scores to multiples of 2 ** -36.
    np.testing.assert_allclose(threshold[finite], exact[finite], rtol=2.0**-24, atol=2.0**-35)

    entry = (torch.arange(length) + window).clamp(max=length)
    selected = covered(entry, part.exit).numpy()
    selected[:, :sinks] = False
    np.testing.assert_array_equal(selected, oracle.selected)
    assert (part.exit[:sinks] == length).all()
    assert (part.exit >= entry).all()
    np.testing.assert_array_equal(covered(part.interior_start, part.interior_end).numpy(), oracle.interior)
    np.testing.assert_array_equal(part.interior_size.numpy(), oracle.interior.sum(1))
    with np.errstate(invalid="ignore"):
        saturated = oracle.candidate & (scores.double().numpy() - exact[:, None] >= 1)
    np.testing.assert_array_equal(part.saturated_size.numpy(), saturated.sum(1))


@pytest.mark.parametrize("kind", SCORES)
def test_every_prefix_is_selected_from_as_if_it_were_sorted(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        lengths = [*rng.choice(LENGTHS, size=rng.integers(0, 4)), rng.choice(LENGTHS[1:])]
        topk, window, sinks = (int(rng.choice(choices)) for choices in ((1, 2, 3, 8, 30), (1, 2, 5, 50), (0, 0, 1, 4)))
        scores = draw(kind, rng, 1, 2, int(sum(lengths)))
        selection = causal_sparsek(scores, topk, window, sinks=sinks, cu_seqlens=bounds(lengths))
        assert all(tensor.shape == scores.shape for tensor in selection)
        assert [tensor.dtype for tensor in selection] == [torch.float32] + [torch.int32] * 5
        for head in range(2):
            start = 0
            for length in map(int, lengths):
                own = scores[0, head, start : start + length]
                oracle = select(own.double().numpy(), topk, window, sinks)
                part = of_document(selection, head, start, length)
                assert_equals_oracle(part, oracle, own, window, min(sinks, length))
                start += length


@pytest.mark.parametrize("work", [1, 2**8, 2**18])
def test_the_number_of_guesses_in_a_round_does_not_matter(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = draw("narrow", np.random.default_rng(1), 2, 2, 300)
    expected = causal_sparsek(scores, 20, 7, sinks=2)
    monkeypatch.setattr(crossing, "CPU_WORK", work)
    for actual, exact in zip(causal_sparsek(scores, 20, 7, sinks=2), expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("kind", ["normal", "rising slowly", "quarters", "with an offset"])
def test_thresholds_only_rise_and_a_block_of_rows_sees_few_keys(kind: str) -> None:
    topk, window, block, length = 32, 8, 16, 1000
    scores = draw(kind, np.random.default_rng(2), 1, 3, length)
    selection = causal_sparsek(scores, topk, window)
    assert (selection.threshold.diff() >= 0)[..., topk + window :].all()
    assert selection.threshold[..., topk + window - 1].isinf().all()
    assert selection.threshold[..., topk + window :].isfinite().all()
    entry = (torch.arange(length) + window).clamp(max=length)
    for head in range(3):
        selected = covered(entry, selection.exit[0, head])
        seen = [rows.any(0).sum().item() for rows in selected.split(block)]
        assert max(seen) <= topk + block - 1
        assert (selected.sum(1) == (torch.arange(length) - window + 1).clamp(0, topk)).all()


@pytest.mark.parametrize("kind", ["normal", "narrow", "with an offset", "quarters"])
def test_gates_of_a_row_add_up_to_topk(kind: str) -> None:
    topk, window, length = 24, 5, 600
    scores = draw(kind, np.random.default_rng(3), 1, 1, length)
    threshold = causal_sparsek(scores, topk, window).threshold[0, 0]
    candidate = torch.arange(length) <= torch.arange(length)[:, None] - window
    gates = (scores[0, 0] - threshold[:, None]).clamp(0, 1).double() * candidate
    rows = threshold.isfinite()
    # The threshold's own rounding counts once for each key inside.
    tolerance = 2.0**-24 * scores.abs().max().clamp(min=1).item() * length
    torch.testing.assert_close(gates.sum(1)[rows], torch.full_like(gates[0], topk)[rows], rtol=0, atol=tolerance)


def test_scores_a_unit_apart_are_selected_hard_and_get_no_gradient() -> None:
    scores = 1.5 * torch.randperm(200, generator=torch.Generator().manual_seed(0)).float()
    scores = scores.view(1, 1, -1).requires_grad_()
    selection = causal_sparsek(scores, 16, 4)
    assert not selection.interior_size.any()
    threshold = selection.threshold[0, 0]
    gates = (scores[0, 0] - threshold[:, None]).clamp(0, 1)
    entry = (torch.arange(200) + 4).clamp(max=200)
    candidate = torch.arange(200) <= torch.arange(200)[:, None] - 4
    assert torch.equal(gates * candidate, covered(entry, selection.exit[0, 0]).float())
    threshold[threshold.isfinite()].sum().backward()
    assert not scores.grad.any()


def test_gradient_of_the_threshold_equals_finite_differences() -> None:
    scores = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def thresholds(scores: Tensor) -> Tensor:
        return causal_sparsek(scores, 6, 3, sinks=2).threshold.nan_to_num(neginf=0.0)

    # Piecewise linear: wide steps are exact unless they cross a kink. Scores are rounded to 2 ** -36.
    assert torch.autograd.gradcheck(thresholds, (scores,), eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_threshold_equals_the_dense_jacobian(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(4)
    lengths = [1, 70, 0, 40]
    scores = draw("narrow", rng, 1, 2, 111).to(dtype).requires_grad_()
    selection = causal_sparsek(scores, 8, 3, sinks=1, cu_seqlens=bounds(lengths))
    assert selection.interior_size.max() > 8
    cotangent = torch.tensor(rng.normal(size=(1, 2, 111)))
    (grad,) = torch.autograd.grad(selection.threshold, scores, cotangent.to(dtype))
    for head in range(2):
        inside = covered(selection.interior_start[0, head], selection.interior_end[0, head]).double()
        jacobian = inside / inside.sum(1, keepdim=True).clamp(min=1)
        exact = cotangent[0, head].to(dtype).double() @ jacobian
        torch.testing.assert_close(
            grad[0, head].double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-10
        )


def test_gates_and_their_gradient_equal_those_of_each_prefix_alone() -> None:
    topk, window, length = 5, 2, 40
    generator = torch.Generator().manual_seed(5)
    scores = (0.4 * torch.randn(length, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(length, length, generator=generator, dtype=torch.float64)
    candidate = torch.arange(length) <= torch.arange(length)[:, None] - window
    threshold = causal_sparsek(scores.view(1, 1, -1), topk, window).threshold[0, 0]
    gates = (scores - threshold[:, None]).clamp(0, 1).where(candidate, 0.0)
    mask = candidate[window + topk :]
    alone = sparsek(scores.expand(len(mask), -1), topk, mask=mask)
    torch.testing.assert_close(gates[window + topk :], alone, rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad((gates * weight)[window + topk :].sum(), scores)
    (exact,) = torch.autograd.grad((alone * weight[window + topk :]).sum(), scores)
    torch.testing.assert_close(grad, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "narrow", "tiny", "quarters"])
def test_later_tokens_change_nothing_bit_for_bit(kind: str) -> None:
    rng = np.random.default_rng(6)
    window, length = 5, 200
    scores = draw(kind, rng, 1, 2, length)
    before = causal_sparsek(scores, 10, window, sinks=1)
    for token in rng.integers(1, length - window, size=8):
        perturbed = scores.clone()
        perturbed[..., token:] = draw("normal", rng, 1, 2, length - token) * 3
        after = causal_sparsek(perturbed, 10, window, sinks=1)
        same = slice(0, token + window)
        for name in ("threshold", "interior_size", "saturated_size"):
            assert torch.equal(getattr(after, name)[..., same], getattr(before, name)[..., same])
        for name in ("exit", "interior_start", "interior_end"):
            rows = [getattr(selection, name)[..., :token].clamp(max=token + window) for selection in (before, after)]
            assert torch.equal(*rows)


def test_packed_documents_equal_each_alone_bit_for_bit() -> None:
    rng = np.random.default_rng(7)
    lengths = [30, 0, 1, 90, 6]
    # Documents of very different scores, so that one would swamp the others.
    scores = torch.cat([draw("narrow", rng, 1, 3, length) * 10**i + i for i, length in enumerate(lengths)], -1)
    scores.requires_grad_()
    cotangent = torch.tensor(rng.normal(size=scores.shape), dtype=torch.float32)
    packed = causal_sparsek(scores, 6, 4, sinks=2, cu_seqlens=bounds(lengths))
    (packed_grad,) = torch.autograd.grad(packed.threshold, scores, cotangent)
    start = 0
    for length in filter(None, lengths):
        own = scores[..., start : start + length].detach().requires_grad_()
        alone = causal_sparsek(own, 6, 4, sinks=2)
        for head in range(3):
            for actual, exact in zip(of_document(packed, head, start, length), of_document(alone, head, 0, length)):
                assert torch.equal(actual, exact)
        (grad,) = torch.autograd.grad(alone.threshold, own, cotangent[..., start : start + length])
        torch.testing.assert_close(packed_grad[..., start : start + length], grad, rtol=1e-6, atol=1e-9)
        start += length


def test_layout_and_the_other_heads_change_nothing_bit_for_bit() -> None:
    scores = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(8)).permute(0, 2, 1)
    assert not scores.is_contiguous()
    together = causal_sparsek(scores, 6, 4, sinks=1)
    for batch in range(2):
        for head in range(3):
            alone = causal_sparsek(scores[batch, head].reshape(1, 1, -1), 6, 4, sinks=1)
            for actual, exact in zip(together, alone, strict=True):
                assert torch.equal(actual[batch, head], exact[0, 0])


@pytest.mark.parametrize(
    ("topk", "window", "sinks"), [(50, 3, 0), (2**40, 1, 0), (5, 50, 0), (1, 2**40, 1), (5, 3, 60)]
)
def test_where_all_fits_everything_is_selected(topk: int, window: int, sinks: int) -> None:
    scores = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(9)).requires_grad_()
    selection = causal_sparsek(scores, topk, window, sinks=sinks)
    assert (selection.threshold == -torch.inf).all()
    assert (selection.exit == 40).all()
    assert not selection.interior_size.any()
    selection.threshold.sum().backward()
    assert not scores.grad.any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_stay_in_their_document(wrong: float) -> None:
    scores = draw("normal", np.random.default_rng(10), 1, 1, 90)
    scores[..., 30:60:3] = wrong
    selection = causal_sparsek(scores, 4, 3, cu_seqlens=bounds([30, 30, 30]))
    for start in (0, 60):
        alone = causal_sparsek(scores[..., start : start + 30], 4, 3)
        for actual, exact in zip(of_document(selection, 0, start, 30), of_document(alone, 0, 0, 30)):
            assert torch.equal(actual, exact)
    middle = of_document(selection, 0, 30, 30)
    for rows in middle[1:4]:
        assert ((rows >= 0) & (rows <= 30)).all()
    kept = covered((torch.arange(30) + 3).clamp(max=30), middle.exit)[-1]
    is_wrong = torch.arange(30) % 3 == 0
    assert kept.sum() == 4
    assert not kept[is_wrong if wrong == -torch.inf else ~is_wrong].any()


def test_infinitely_bad_candidates_that_are_needed_give_no_finite_threshold() -> None:
    scores = torch.full((1, 1, 12), -torch.inf)
    scores[..., 0] = 1.0
    assert not causal_sparsek(scores, 3, 1).threshold.isfinite().any()


class _Reads(TorchDispatchMode):
    """Collects operations that wait for the device, or have a result of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host() -> None:
    scores = torch.randn(1, 2, 100).requires_grad_()
    with _Reads() as reads:
        selection = causal_sparsek(scores, 8, 4, sinks=1, cu_seqlens=bounds([30, 70]))
        selection.threshold.nan_to_num(neginf=0.0).sum().backward()
        topk_statistics(scores, selection, 8, 4, 1, bounds([30, 70]))
    assert reads.found == []


def test_no_tensor_grows_with_topk(largest_tensor: Callable[[Callable[[], object]], int]) -> None:
    scores = torch.randn(1, 2, 16384)
    assert largest_tensor(lambda: causal_sparsek(scores, 4096, 1024)) <= 2 * scores.numel() + 1


@pytest.mark.parametrize("needs_grad", [True, False])
def test_compiles_as_one_graph(needs_grad: bool) -> None:
    def thresholds(scores: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        selection = causal_sparsek(scores * 2, 4, 2, cu_seqlens=cu_seqlens)
        return selection.threshold.clamp(min=-9) * 2, selection.exit

    scores = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(11)).requires_grad_(needs_grad)
    compiled = torch.compile(thresholds, fullgraph=True, backend="aot_eager")
    outputs = compiled(scores, bounds([10, 30]))
    expected = thresholds(scores, bounds([10, 30]))
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    if needs_grad:
        grads = [torch.autograd.grad(output[0].sum(), scores)[0] for output in (outputs, expected)]
        assert grads[0].any()
        assert torch.equal(*grads)


def test_the_operations_are_what_they_say_to_pytorch() -> None:
    tests = ("test_schema", "test_faketensor")
    scores = torch.randn(1, 2, 40)
    arguments = (scores, 4, 2, 1, bounds([10, 30]), "reference")
    torch.library.opcheck(torch.ops.sparsetrain.causal_sparsek, arguments, test_utils=tests)
    selection = causal_sparsek(scores, 4, 2)
    intervals = (selection.interior_start, selection.interior_end, selection.interior_size)
    torch.library.opcheck(torch.ops.sparsetrain.causal_sparsek_bwd, (scores, *intervals, "reference"), test_utils=tests)


def test_stays_in_single_precision_under_autocast() -> None:
    scores = torch.randn(1, 2, 100)
    exact = causal_sparsek(scores, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, expected in zip(causal_sparsek(scores, 8, 4), exact, strict=True):
            assert torch.equal(actual, expected)


SCORES_32 = torch.zeros(1, 1, 8)


@pytest.mark.parametrize(
    ("scores", "arguments", "error", "message"),
    [
        (SCORES_32.bfloat16(), {}, TypeError, r"scores are torch.bfloat16.*float32"),
        (SCORES_32[0], {}, ValueError, r"shape \(1, 8\), expected \[batch, heads, tokens\]"),
        (SCORES_32[..., :0], {}, ValueError, r"shape \(1, 1, 0\)"),
        (SCORES_32.expand(1, 2**23, 8), {}, ValueError, r"67108864 tokens"),
        (SCORES_32, {"topk": 0}, ValueError, r"topk=0 must be at least 1"),
        (SCORES_32, {"window": 0}, ValueError, r"window=0 must be at least 1"),
        (SCORES_32, {"sinks": -1}, ValueError, r"sinks=-1 must be at least 0"),
        (SCORES_32, {"topk": 2.0}, TypeError, r"topk=2.0 is no integer"),
        (SCORES_32, {"topk": True}, TypeError, r"topk=True is no integer"),
        (SCORES_32, {"window": "2"}, TypeError, r"window='2' is no integer"),
        (SCORES_32, {"sinks": None}, TypeError, r"sinks=None is no integer"),
        (SCORES_32.tolist(), {}, TypeError, r"scores is a list, expected a tensor"),
        (SCORES_32, {"cu_seqlens": [0, 8]}, TypeError, r"cu_seqlens is a list, expected a tensor"),
        (SCORES_32, {"cu_seqlens": torch.tensor([0, 8])}, TypeError, r"cu_seqlens is torch.int64.*int32"),
        (SCORES_32, {"cu_seqlens": torch.tensor([0]).int()}, TypeError, r"at least two bounds"),
        (SCORES_32.expand(2, 1, 8), {"cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, r"batch 1.*batch 2"),
        (SCORES_32, {"cu_seqlens": torch.tensor([0, 9]).int()}, ValueError, r"cu_seqlens=\[0, 9\] must rise.*8"),
        (SCORES_32, {"cu_seqlens": torch.tensor([0, 5, 3, 8]).int()}, ValueError, r"cu_seqlens=\[0, 5, 3, 8\]"),
    ],
)
def test_wrong_arguments_are_named(scores: Tensor, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_sparsek(scores, **{"topk": 2, "window": 1, **arguments})


def test_statistics_equal_counting_each_row() -> None:
    topk, window, sinks, lengths = 6, 3, 2, [5, 60, 35]
    scores = draw("narrow", np.random.default_rng(12), 1, 2, 100) + 100
    selection = causal_sparsek(scores, topk, window, sinks=sinks, cu_seqlens=bounds(lengths))
    actual = topk_statistics(scores, selection, topk, window, sinks, bounds(lengths))

    rows: dict[str, list[float]] = {"kept_mass": [], "support": [], "interior": [], "saturated": []}
    ages: list[int] = []
    for head in range(2):
        start = 0
        for length in lengths:
            oracle = select(scores[0, head, start : start + length].double().numpy(), topk, window, sinks)
            start += length
            row, key = np.nonzero(oracle.selected)
            ages += list(row - key - window)
            for row in np.flatnonzero(np.isfinite(oracle.threshold)):
                gate = oracle.gate[row] * oracle.candidate[row]
                rows["kept_mass"].append(gate[oracle.selected[row]].sum() / topk)
                rows["support"].append((gate > 0).sum())
                rows["interior"].append(oracle.interior[row].sum())
                rows["saturated"].append(((gate >= 1) & ~oracle.interior[row]).sum() / topk)
    expected = {name: np.mean(values) for name, values in rows.items()}
    expected["older_than_1_window"] = np.mean(np.array(ages) >= window)
    expected["older_than_4_windows"] = np.mean(np.array(ages) >= 4 * window)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dim() == 0
        # Thresholds near 100 are known to 4e-6.
        assert actual[name].item() == pytest.approx(value, abs=1e-5), name
    assert 0 < expected["kept_mass"] < 1
    assert 0 < expected["older_than_4_windows"] < expected["older_than_1_window"] < 1


def test_statistics_without_a_full_row_are_nan_not_zero() -> None:
    scores = torch.randn(1, 1, 10)
    statistics = topk_statistics(scores, causal_sparsek(scores, 20, 3), 20, 3)
    assert statistics["kept_mass"].isnan()
    assert statistics["older_than_1_window"] > 0


@in_the_interpreter
@pytest.mark.parametrize("kind", ["normal", "beyond 64 bits", "quarters"])
def test_kernels_give_what_plain_pytorch_gives_bit_for_bit(kind: str) -> None:
    scores, cu_seqlens = draw(kind, np.random.default_rng(11), 1, 1, 300), bounds([50, 0, 1, 149, 100])
    expected, actual = (causal_sparsek(scores, 7, 5, sinks=2, cu_seqlens=cu_seqlens, backend=name) for name in BOTH)
    for name, ours, plain in zip(CausalSelection._fields, actual, expected, strict=True):
        assert torch.equal(ours, plain), name


@in_the_interpreter
def test_kernels_agree_across_the_cells_of_the_coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain_kernels.causal_selection.triton.crossing.CHUNK", 128)
    scores = torch.cat([draw(kind, np.random.default_rng(12), 1, 1, 700) for kind in ("narrow", "quarters")], 1)
    expected, actual = (causal_sparsek(scores, 60, 40, sinks=3, backend=name) for name in BOTH)
    assert all(torch.equal(ours, plain) for ours, plain in zip(actual, expected, strict=True))


@in_the_interpreter
@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf"), -float("inf")])
def test_kernels_sort_packed_documents_as_plain_pytorch_does(wrong: float) -> None:
    scores, cu_seqlens = draw("quarters", np.random.default_rng(13), 1, 2, 120), bounds([50, 0, 1, 69])
    scores[..., ::7] = wrong
    scores[..., 1::7] = -wrong
    expected, actual = (causal_sparsek(scores, 7, 5, sinks=2, cu_seqlens=cu_seqlens, backend=name) for name in BOTH)
    for name, ours, plain in zip(CausalSelection._fields, actual, expected, strict=True):
        assert torch.equal(ours.nan_to_num(nan=7e7), plain.nan_to_num(nan=7e7)), name


@in_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_kernels_give_the_gradient_of_plain_pytorch_bit_for_bit(size: float, dtype: torch.dtype) -> None:
    scores = draw("narrow", np.random.default_rng(14), 2, 2, 1100).to(dtype)
    selection = causal_sparsek(scores, 50, 5)
    generator = torch.Generator().manual_seed(14)
    grad = size * torch.randn(2, 1100, 2, generator=generator, dtype=dtype).transpose(1, 2)
    intervals = (selection.interior_start, selection.interior_end, selection.interior_size)
    expected, actual = (
        torch.ops.sparsetrain.causal_sparsek_bwd(grad, *intervals, name) for name in ("reference", "triton")
    )
    assert torch.equal(actual, expected)
    assert bool(actual.any()) == (size > 0)


@in_the_interpreter
def test_kernels_spoil_the_whole_gradient_where_one_is_not_a_number() -> None:
    scores = draw("narrow", np.random.default_rng(15), 1, 2, 300).requires_grad_()
    threshold = causal_sparsek(scores, 20, 5, backend="triton").threshold
    grad = torch.ones_like(threshold)
    grad[0, 1, 200] = float("nan")
    assert torch.autograd.grad(threshold, scores, grad)[0].isnan().all()


@in_the_interpreter
@pytest.mark.parametrize(("batch", "lengths"), [(2, None), (1, [5, 0, 1600, 395])], ids=["one", "packed"])
def test_kernels_give_the_statistics_of_plain_pytorch(batch: int, lengths: list[int] | None) -> None:
    scores = draw("narrow", np.random.default_rng(16), batch, 2, 2000) + 100
    cu_seqlens = None if lengths is None else bounds(lengths)
    selection = causal_sparsek(scores, 30, 4, sinks=2, cu_seqlens=cu_seqlens)
    expected, actual = (
        topk_statistics(scores, selection, 30, 4, 2, cu_seqlens, backend=name) for name in ("reference", "triton")
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0)


def test_a_second_derivative_of_the_threshold_is_refused() -> None:
    scores = torch.randn(1, 1, 30, dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        return causal_sparsek(scores, 6, 3).threshold.nan_to_num(neginf=0.0).pow(2).sum()

    (grad,) = torch.autograd.grad(loss(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss() + grad.square().sum(), scores)
