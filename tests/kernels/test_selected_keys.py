"""Attention over a SparseK selection equals its definition, and keeps what it promises beyond that.

Both implementations: gathered tiles in plain PyTorch, and the Triton kernels in Triton's interpreter. The selection
comes from an oracle, so that attention is judged apart from the operator that selects in training.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_oracle import make_inputs
from selected_cases import (
    GATES,
    KERNELS,
    NAMES,
    PACKED,
    assert_equals_the_definition,
    make_case,
    outputs_and_gradients,
)
from selected_oracle import attend, select
from sparsetrain_kernels import (
    causal_attention,
    causal_attention_dense,
    selected_attention,
    selected_attention_dense,
    sparsek_attention,
)
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from torch import Tensor


@pytest.fixture(params=["reference", "triton"])
def attention(request: pytest.FixtureRequest) -> partial[tuple[Tensor, Tensor]]:
    """The operation by each backend; what the Triton kernels do not write stays NaN or nonsense."""
    if request.param == "triton":
        if not (TRITON_INSTALLED and INTERPRETING):
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        request.getfixturevalue("poisoned_kernel_memory")
    return partial(selected_attention, return_lse=True, backend=request.param)


@pytest.fixture
def poisoned_kernel_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory of the Triton launches holds NaN, and integers that no index may be."""
    if importlib.util.find_spec(KERNELS) is None or importlib.util.find_spec(f"{KERNELS}.launch") is None:
        pytest.skip("the Triton kernels are not there")
    importlib.import_module(f"{KERNELS}.launch")

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocated

    fake = SimpleNamespace(**vars(torch))
    fake.empty, fake.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    for name, module in list(sys.modules.items()):
        if name.startswith(KERNELS) and isinstance(getattr(module, "torch", None), ModuleType):
            monkeypatch.setattr(module, "torch", fake)


# The definition.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bounds", [None, (0, 1, 1, 9, 48, 60)], ids=["one", "packed"])
@pytest.mark.parametrize("shared", [False, True], ids=["a head", "shared"])
def test_the_definition_is_what_a_loop_over_rows_computes(gate: str, bounds, shared: bool) -> None:
    case = make_case(tokens=60, window=6, topk=5, sinks=2, gate=gate, bounds=bounds, shared=shared, dtype=torch.float64)
    out, lse = selected_attention_dense(*case.trained, case.exit, **case.options)
    arrays = [tensor.detach().numpy() for tensor in (*case.trained, case.exit)]
    expected = attend(*arrays, window=6, sinks=2, gate=gate, bounds=list(bounds or (0, 60)))
    np.testing.assert_allclose(out.detach().numpy(), expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.detach().numpy(), expected[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gate", ["value", "log"])
def test_gradients_of_the_definition_are_the_slopes_of_the_loop(gate: str) -> None:
    case = make_case(2, 1, 24, window=4, topk=5, sinks=1, gate=gate, dtype=torch.float64, head_dim=4)
    _, _, *gradients = outputs_and_gradients(selected_attention_dense, case)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(case.trained[0].shape, generator=generator, dtype=torch.float64).numpy()
    arrays = [tensor.detach().numpy().copy() for tensor in case.trained]

    def loss() -> float:
        out, _ = attend(*arrays, case.exit.numpy(), window=4, sinks=1, gate=gate, bounds=[0, 24])
        return float((out * grad_out).sum())

    step = 1e-6
    for array, gradient in zip(arrays, gradients, strict=True):
        flat = array.reshape(-1)
        for index in range(0, flat.size, max(1, flat.size // 24)):
            kept = flat[index]
            if not np.isfinite(kept):
                continue
            flat[index] = kept + step
            above = loss()
            flat[index] = kept - step
            below = loss()
            flat[index] = kept
            assert gradient.flatten()[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)
    assert all(gradient.any() for gradient in gradients)


def test_the_straight_gate_has_the_gradient_of_a_log_gate_at_one() -> None:
    case = make_case(gate="straight", dtype=torch.float64)
    _, _, *straight = outputs_and_gradients(selected_attention_dense, case)
    # All gates 1 but for an added logit of slope 1, whose derivative finite differences take.
    query, key, value, scores, threshold = case.trained
    out, lse = selected_attention_dense(*case.trained, case.exit, **case.options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(scores)
    rows = torch.arange(177)
    for head in range(4):
        weights = torch.exp(query[0, head] @ key[0, head // 2].T / 4 - lse[0, head, :, None])
        inner = grad_out[0, head] @ value[0, head // 2].T - (grad_out[0, head] * out[0, head]).sum(-1, keepdim=True)
        gates = scores[0, head // 2] - threshold[0, head // 2, :, None]
        older = (rows[:, None] - rows >= 20) & (rows >= 3) & (rows[:, None] < case.exit[0, head // 2])
        expected[0, head // 2] += torch.where(older & (gates > 0) & (gates < 1), weights * inner, 0).sum(0).detach()
    torch.testing.assert_close(straight[3], expected, rtol=1e-10, atol=1e-12)


# Both implementations against the definition.


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bounds", [None, PACKED], ids=["one", "packed"])
def test_equals_the_definition_for_every_gate(attention, gate: str, bounds) -> None:
    assert_equals_the_definition(attention, make_case(gate=gate, bounds=bounds))


@pytest.mark.parametrize("gate", GATES)
def test_all_heads_may_share_a_selection(attention, gate: str) -> None:
    assert_equals_the_definition(attention, make_case(6, 3, 110, gate=gate, bounds=(0, 7, 110), shared=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_definition_in_every_dtype(attention, dtype: torch.dtype) -> None:
    if attention.keywords["backend"] == "triton" and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("no fp64 kernels; Triton's interpreter computes bf16 wrongly, so that it is tested on a GPU")
    assert_equals_the_definition(attention, make_case(tokens=120, dtype=dtype, batch=2))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_query_heads_that_share_keys(attention, group: int) -> None:
    assert_equals_the_definition(attention, make_case(2 * group, 2, 40, window=10, topk=6, gate="log"))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_head_dims(attention, head_dim: int) -> None:
    assert_equals_the_definition(attention, make_case(2, 1, 70, head_dim=head_dim))


@pytest.mark.parametrize("tokens", [1, 19, 20, 21, 63, 64, 65, 127, 128, 129, 200])
def test_any_length(attention, tokens: int) -> None:
    assert_equals_the_definition(attention, make_case(2, 1, tokens))


@pytest.mark.parametrize(
    "budget",
    [
        {"window": 1, "topk": 1, "sinks": 0},
        {"window": 1, "topk": 5, "sinks": 2},
        {"window": 150, "topk": 3, "sinks": 0},
        {"window": 3, "topk": 100, "sinks": 0},
        {"window": 64, "topk": 64, "sinks": 1},
        {"window": 2, "topk": 2, "sinks": 70},
        {"window": 2, "topk": 2, "sinks": 500},
        {"window": 500, "topk": 2, "sinks": 0},
        {"window": 5, "topk": 500, "sinks": 0},
    ],
    ids=str,
)
def test_any_budget(attention, budget) -> None:
    assert_equals_the_definition(attention, make_case(2, 1, 160, bounds=(0, 1, 12, 160), **budget))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0])
def test_scores_that_tie_or_lie_far_apart(attention, spread: float) -> None:
    case = make_case(2, 1, 110, spread=spread)
    assert_equals_the_definition(attention, case)
    # Far apart, every gate is 0 or 1 but where two scores happen to be close: hardly any gradient.
    gradient = outputs_and_gradients(attention, case)[5]
    assert (gradient != 0).float().mean() <= (0.6 if spread == 30 else 1)


@pytest.mark.parametrize("gate", GATES)
def test_a_selection_that_is_off_by_one_row_is_noticed(attention, gate: str) -> None:
    case = make_case(2, 1, 90, gate=gate)
    shifted = case._replace(exit=case.exit + 1)

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return attention(*args[:-1], shifted.exit, **options)

    with pytest.raises(AssertionError, match="out: "):
        assert_equals_the_definition(wrong, case)


# Limits.


def test_a_budget_for_every_token_is_causal_attention(attention) -> None:
    for budget in ({"topk": 200, "window": 7}, {"topk": 3, "window": 200}, {"topk": 3, "window": 7, "sinks": 200}):
        case = make_case(2, 1, 140, **budget)
        out, lse, *gradients = outputs_and_gradients(attention, case)
        dense = [tensor.detach().requires_grad_() for tensor in case.trained[:3]]
        expected, expected_lse = causal_attention_dense(*dense)
        torch.testing.assert_close(out, expected.detach(), rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=2e-6)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
        for ours, theirs in zip(gradients[:3], torch.autograd.grad(expected, dense, grad_out), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        assert not gradients[3].any()
        assert not gradients[4].any()


def test_selecting_nothing_is_a_sliding_window(attention) -> None:
    case = make_case(sinks=0)
    never = torch.arange(177, dtype=torch.int32).add(20).clamp(max=177).expand(1, 2, -1)
    out, _ = attention(*case.trained, never, **case.options)
    torch.testing.assert_close(out, causal_attention(*case.trained[:3], window=20), rtol=0, atol=2e-6)


def test_what_each_gate_does_to_the_size_of_the_output(attention) -> None:
    case = make_case(window=3, topk=20, sinks=0)
    query, key, value, *selection = case.trained
    ones = torch.ones_like(value)

    def output(gate: str) -> Tensor:
        return attention(query, key, ones, *selection, case.exit, **{**case.options, "gate": gate})[0].detach()

    torch.testing.assert_close(output("log"), torch.ones_like(query), rtol=0, atol=1e-6)
    torch.testing.assert_close(output("straight"), torch.ones_like(query), rtol=0, atol=1e-6)
    assert (output("value")[:, :, 40:] < 0.99).all()
    assert (output("value") > 0).all()


def test_the_straight_gate_leaves_the_output_to_the_selection(attention) -> None:
    case = make_case(gate="straight")
    query, key, value, scores, threshold = case.trained
    out, lse = attention(query, key, value, scores, threshold, case.exit, **case.options)
    same, same_lse = attention(query, key, value, scores * 0.3, threshold + 0.1, case.exit, **case.options)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)


# Isolation.


def test_packed_documents_equal_each_alone(attention) -> None:
    case = make_case(bounds=PACKED)
    packed = outputs_and_gradients(attention, case)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(packed[0].shape, generator=generator, dtype=torch.float64).float()
    for start, stop in pairwise(PACKED):
        if start == stop:
            continue
        leaves = [tensor.detach()[:, :, start:stop].requires_grad_() for tensor in case.trained]
        options = {**case.options, "cu_seqlens": None}
        out, lse = attention(*leaves, case.exit[:, :, start:stop] - start, **options)
        alone = [out, lse, *torch.autograd.grad(out, leaves, grad_out[:, :, start:stop])]
        for ours, theirs in zip(packed, alone, strict=True):
            if attention.keywords["backend"] == "reference":
                assert torch.equal(ours[:, :, start:stop], theirs)
            else:
                torch.testing.assert_close(ours[:, :, start:stop], theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("foreign", [1e3, float("nan")], ids=str)
def test_other_documents_may_hold_anything(attention, foreign: float) -> None:
    if attention.keywords["backend"] == "triton" and foreign != foreign:
        pytest.skip("a tile of the kernels may hold rows of two documents, and weights of zero times NaN are NaN")
    case = make_case(bounds=PACKED)
    clean = outputs_and_gradients(attention, case)
    other = slice(30, 110)
    trained = [tensor.detach().clone() for tensor in case.trained]
    for tensor in trained[:4]:
        tensor[:, :, other] = foreign
    changed = outputs_and_gradients(attention, case._replace(trained=tuple(trained)))
    same = torch.ones(177, dtype=torch.bool)
    same[other] = False
    for name, a, b in zip(NAMES, clean, changed, strict=True):
        assert torch.equal(a[:, :, same], b[:, :, same]), name


def test_keys_that_have_gone_for_good_are_not_read(attention) -> None:
    case = make_case(tokens=200, window=5, topk=6)
    query, key, value, scores, threshold = (tensor.detach().clone() for tensor in case.trained)
    clean, _ = attention(query, key, value, scores, threshold, case.exit, **case.options)
    last = case.exit.amax(1)[0]
    gone = (last <= 60).nonzero().flatten()
    assert len(gone) >= 20
    key[:, :, gone] = value[:, :, gone] = float("nan")
    dirty, _ = attention(query, key, value, scores, threshold, case.exit, **case.options)
    # A tile of at most 128 rows that starts at row 60 or later sees none of them.
    assert torch.equal(clean[:, :, 187:], dirty[:, :, 187:])
    assert dirty[:, :, gone].isnan().all()


@pytest.mark.parametrize("gate", GATES)
def test_no_row_knows_what_comes_after_it(attention, gate: str) -> None:
    backend = attention.keywords["backend"]
    query, key, value = (tensor.detach() for tensor in make_inputs(2, 1, 100))
    scores = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(3))
    attend = partial(sparsek_attention, topk=9, window=11, sinks=2, gate=gate, backend=backend)
    before = attend(query, key, value, scores)
    for token in (1, 64, 99):
        changed = [tensor.clone() for tensor in (query, key, value, scores)]
        for tensor in changed:
            tensor[:, :, token] += 5.0
        after = attend(*changed)
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert not torch.equal(before[:, :, token], after[:, :, token])


# The whole layer.


@pytest.mark.parametrize("gate", ["value", "log"])
@pytest.mark.parametrize(
    ("shared", "bounds"), [(False, None), (True, (0, 3, 3, 40))], ids=["a head, one", "shared, packed"]
)
def test_gradients_of_the_layer_are_its_slopes(gate: str, shared: bool, bounds) -> None:
    query, key, value = make_inputs(4, 2, 40, dtype=torch.float64, head_dim=4)
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(1, 1 if shared else 2, 40, generator=generator, dtype=torch.float64) * 0.5
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    layer = partial(sparsek_attention, topk=6, window=4, sinks=1, gate=gate, cu_seqlens=cu_seqlens)
    leaves = (query, key, value, scores.requires_grad_())
    weights = torch.randn(query.shape, generator=generator, dtype=torch.float64)
    # Thresholds are exact to about 2e-11, which the step divides.
    tolerance = {"eps": 1e-5, "atol": 5e-6, "rtol": 1e-6}
    assert torch.autograd.gradcheck(lambda *t: (layer(*t) * weights).sum(), leaves, fast_mode=True, **tolerance)
    tensors = [tensor.detach() for tensor in leaves[:3]]
    assert torch.autograd.gradcheck(lambda t: (layer(*tensors, t) * weights).sum(), leaves[3], **tolerance)
    (gradient,) = torch.autograd.grad((layer(*leaves) * weights).sum(), leaves[3])
    # Tokens that are never among the top k have a gradient too, through the threshold.
    never = select(scores, 6, 4, 1, list(bounds or (0, 40))).exit <= torch.arange(40) + 4
    assert gradient[never].any()


def test_the_layer_is_selection_and_attention(attention) -> None:
    backend = attention.keywords["backend"]
    case = make_case(bounds=PACKED, gate="log")
    query, key, value, scores, _ = case.trained
    cu_seqlens = case.options["cu_seqlens"]
    expected, _ = attention(*case.trained, case.exit, **case.options)
    out = sparsek_attention(query, key, value, scores, 12, 20, 3, gate="log", cu_seqlens=cu_seqlens, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_grouped_heads_equal_repeated_keys_and_scores(attention) -> None:
    backend = attention.keywords["backend"]
    grouped = [tensor.detach().requires_grad_() for tensor in make_inputs(6, 2, 50)]
    scores = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(3)).requires_grad_()
    query, key, value = grouped
    layer = partial(sparsek_attention, topk=9, window=11, sinks=2, backend=backend)
    out = layer(query, key, value, scores)
    same = layer(query, *(tensor.repeat_interleave(3, 1) for tensor in (key, value, scores)))
    torch.testing.assert_close(out, same, rtol=0, atol=2e-6)
    grad_out = torch.randn_like(out)
    ours = torch.autograd.grad(out, (*grouped, scores), grad_out)
    theirs = torch.autograd.grad(same, (*grouped, scores), grad_out)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Memory, layout and repetition.


def test_runs_repeat_bit_for_bit(attention) -> None:
    case = make_case(2, 1, 150, batch=2)
    first = outputs_and_gradients(attention, case)
    again = outputs_and_gradients(attention, case)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_scores_may_be_expanded_over_the_heads(attention) -> None:
    case = make_case(shared=True)
    *tensors, scores, threshold = case.trained
    out, _ = attention(*tensors, scores, threshold, case.exit, **case.options)
    each = [tensor.expand(-1, 2, -1) for tensor in (scores, threshold, case.exit)]
    same, _ = attention(*tensors, *each, **case.options)
    torch.testing.assert_close(out, same, rtol=0, atol=1e-6)


def test_memory_grows_with_the_length(largest_tensor) -> None:
    def train(attention: Callable[..., tuple[Tensor, Tensor]], tokens: int) -> int:
        query, key, value = make_inputs(2, 1, tokens, head_dim=8)
        exit = torch.arange(tokens, dtype=torch.int32).add(64 + 40).clamp(max=tokens).expand(1, 1, -1)
        numbers = [torch.zeros(1, 1, tokens, requires_grad=True) for _ in range(2)]
        options = {"window": 64, "topk": 40}
        return largest_tensor(lambda: attention(query, key, value, *numbers, exit, **options)[0].sum().backward())

    assert train(selected_attention_dense, 512) >= 512 * 512
    gathered = partial(selected_attention, return_lse=True)
    short, long = train(gathered, 2048), train(gathered, 4096)
    assert long <= 4096 * 4096 / 100
    assert long <= 2.1 * short


def test_autocast_leaves_the_scores_alone() -> None:
    case = make_case(tokens=77)
    low = case.to(torch.bfloat16)
    expected = selected_attention(*low.trained, case.exit, **case.options)
    with torch.autocast("cpu", torch.bfloat16):
        out = selected_attention(*case.trained, case.exit, **case.options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("index", range(5), ids=["query", "key", "value", "scores", "threshold"])
def test_one_input_may_need_a_gradient_alone(attention, index: int) -> None:
    case = make_case(2, 1, 40, window=5, topk=4)
    expected = torch.autograd.grad(attention(*(leaves := case.leaves()), case.exit, **case.options)[0].sum(), leaves)
    tensors = [tensor.detach() for tensor in case.trained]
    tensors[index].requires_grad_()
    out, lse = attention(*tensors, case.exit, **case.options)
    assert not lse.requires_grad
    (gradient,) = torch.autograd.grad(out.sum(), tensors[index])
    assert torch.equal(gradient, expected[index])
