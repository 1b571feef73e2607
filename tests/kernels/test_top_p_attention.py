"""Top-p attention equals dense attention over the keys that sorting finds, and rounding does not change which."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_oracle import FLOOR, NAMES, make_inputs, outputs_and_gradients, worst_error
from sparsetrain_kernels import causal_attention_dense, top_p_attention
from sparsetrain_kernels.top_p_softmax import reference
from torch import Tensor

PACKED = (0, 1, 12, 30, 30, 61, 90)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small share": {"p": 0.2},
    "sinks and window": {"sinks": 3, "window": 5},
    "always has the share": {"p": 0.1, "window": 40},
    "packed": {"bounds": PACKED, "sinks": 2, "window": 3},
    "packed union": {"bounds": PACKED, "window": 1, "union": True},
    "batch": {"batch": 2, "union": True, "sinks": 1},
    "groups": {"query_heads": 7, "kv_heads": 1},
    "head dim": {"head_dim": 24, "window": 2},
    "behind a cache": {"rows": 20, "q_start": 37, "sinks": 2, "window": 4},
}


def make_case(
    query_heads: int = 4,
    kv_heads: int = 2,
    rows: int = 90,
    *,
    batch: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    bounds: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    tensors = make_inputs(query_heads, kv_heads, rows, 90, batch=batch, head_dim=head_dim, dtype=dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return tensors, {"p": 0.7, **options, "cu_seqlens": cu_seqlens}


def attend(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    return outputs_and_gradients(partial(top_p_attention, **options, return_lse=True), tensors)


def keys_read(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """bool ``[B, Hq, N, M]``: row by row, by sorting in fp64."""
    batch, heads, rows, head_dim = query.shape
    group = heads // key.shape[1]
    logits = query.detach().double() @ key.detach().double().repeat_interleave(group, 1).mT * head_dim**-0.5
    read = torch.zeros(logits.shape, dtype=torch.bool)
    start = 0 if options["cu_seqlens"] is not None else options.get("q_start", key.shape[2] - rows)
    bounds = [0, key.shape[2]] if options["cu_seqlens"] is None else options["cu_seqlens"].tolist()
    for row in range(rows):
        place = start + row
        first = max(bound for bound in bounds[:-1] if bound <= place)
        always = set(range(first, min(first + options.get("sinks", 0), place + 1)))
        always |= set(range(max(first, place + 1 - options.get("window", 0)), place + 1))
        for b in range(batch):
            for h in range(heads):
                seen = logits[b, h, row, first : place + 1]
                weights = dict(enumerate(seen.softmax(-1).tolist(), first))
                share, last = sum(weights[j] for j in always), float("inf")
                for j in sorted(weights.keys() - always, key=lambda j: -float(logits[b, h, row, j])):
                    score = float(logits[b, h, row, j])
                    if share >= options["p"] and score != last:
                        break
                    share, last = share + weights[j], score
                    read[b, h, row, j] = True
                read[b, h, row, list(always)] = True
    if options.get("union"):
        read = read.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1)
    return read


def masked(query: Tensor, key: Tensor, value: Tensor, *, read: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask ``[B, Hq, N, M]``; products in the tensors' dtype."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)).masked_fill(~read, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    return weights.to(value.dtype) @ value.repeat_interleave(group, 1), lse


@pytest.mark.parametrize("name", CASES)
def test_equals_attention_over_the_keys_that_sorting_finds(name: str) -> None:
    tensors, options = make_case(**CASES[name])
    read = keys_read(*tensors[:2], options)
    expected = outputs_and_gradients(partial(masked, read=read), tensors)
    for one, other in zip(attend(tensors, options), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_it_in_every_dtype(dtype: torch.dtype) -> None:
    tensors, options = make_case(**CASES["packed"], dtype=dtype)
    dense = partial(masked, read=keys_read(*tensors[:2], options))
    exact = outputs_and_gradients(dense, tuple(t.double() for t in tensors))
    eager = outputs_and_gradients(dense, tensors)
    for name, ours, yardstick, truth in zip(NAMES, attend(tensors, options), eager, exact, strict=False):
        limit = max(2 * worst_error(yardstick, truth), FLOOR[dtype])
        assert worst_error(ours, truth) <= limit, f"{name}: {worst_error(ours, truth):.2e} > {limit:.2e}"


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
def test_equal_keys_are_read_together(p: float) -> None:
    """Logits are multiples of 1/4 here, so that each row has many equal ones."""
    tensors, options = make_case(p=p)
    tensors = tuple(t.detach().round() for t in tensors)
    read = keys_read(*tensors[:2], options)
    logits = tensors[0] @ tensors[1].repeat_interleave(2, 1).mT
    least = logits.masked_fill(~read, float("inf")).amin(-1, keepdim=True)
    assert ((logits == least) & read).sum(-1).float().mean() > 1.5
    expected = outputs_and_gradients(partial(masked, read=read), tensors)
    for one, other in zip(attend(tensors, options), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bounds", [None, PACKED])
def test_the_whole_share_is_full_attention(bounds: tuple[int, ...] | None) -> None:
    tensors, options = make_case(p=1.0, bounds=bounds)
    dense = partial(causal_attention_dense, cu_seqlens=options["cu_seqlens"])
    for one, other in zip(attend(tensors, options), outputs_and_gradients(dense, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("union", [False, True])
def test_gradients_equal_finite_differences(union: bool) -> None:
    tensors = make_inputs(4, 2, 12, head_dim=3, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    options = {"p": 0.6, "sinks": 1, "window": 1, "union": union, "cu_seqlens": cu_seqlens}
    assert not keys_read(*tensors[:2], options)[0, :, 11].all()
    assert torch.autograd.gradcheck(partial(top_p_attention, **options, return_lse=True), tensors)


def sums_of_logit_gradients(at_a_member: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of each row, by a channel in which all keys are 1, where backward adds up its logits in another order."""
    query, key, value = (t.detach() for t in make_inputs(4, 2, 300, head_dim=64, dtype=torch.float64))
    query[..., 0], key[..., 0] = 0, 1
    halfway, logits = reference.find_thresholds, reference._logits

    def least_member(scores: Tensor, later: Tensor, always: Tensor, p: float) -> Tensor:
        threshold = halfway(scores, later, always, p)
        return scores.masked_fill(later | (scores < threshold), float("inf")).amin(-1, keepdim=True)

    with monkeypatch.context() as patch:
        if at_a_member:
            patch.setattr(reference, "find_thresholds", least_member)
        out = top_p_attention(query.requires_grad_(), key, value, 0.8)
        patch.setattr(reference, "_logits", lambda rows, keys: logits(rows.flip(-1), keys.flip(-1)))
        (grad,) = torch.autograd.grad(out.square().sum(), query)
    return grad[..., 0].abs()


def test_backward_reads_the_same_keys_whatever_the_order_of_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    trap = sums_of_logit_gradients(True, monkeypatch)
    assert (trap > 1e-4).float().mean() > 0.1, "a threshold that equals a logit loses keys"
    assert sums_of_logit_gradients(False, monkeypatch).max() < 1e-12


def test_a_threshold_is_no_logit_and_inf_where_none_or_all_are_chosen() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    none = torch.zeros(3, 4, dtype=torch.bool)
    first = torch.tensor([True, False, False, False]).expand(3, 4)
    assert reference.find_thresholds(logits, none, none, 0.6).flatten().tolist() == [2.0, 4.5, -torch.inf]
    assert reference.find_thresholds(logits, none, first, 0.6).flatten().tolist() == [2.0, torch.inf, -torch.inf]
    neighbours = torch.tensor([[1.0, 1.0 + 2**-23]])
    least = reference.find_thresholds(neighbours, none[:1, :2], none[:1, :2], 0.5)
    assert (neighbours >= least).tolist() == [[False, True]]


def test_later_keys_are_not_read() -> None:
    (query, key, value), options = make_case(**CASES["sinks and window"])
    clean = attend((query, key, value), options)
    with torch.no_grad():
        key[:, :, 50:] = value[:, :, 50:] = float("nan")
    leaf = query.detach().requires_grad_()
    out, lse = top_p_attention(leaf, key, value, **options, return_lse=True)
    assert torch.equal(out[:, :, :50], clean[0][:, :, :50])
    assert torch.equal(lse[:, :, :50], clean[1][:, :, :50])
    assert out[:, :, 50:].isnan().all()
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (out, lse)]
    (grad,) = torch.autograd.grad((out, lse), leaf, cotangents)
    assert torch.equal(grad[:, :, :50], clean[2][:, :, :50])


def test_values_of_keys_that_are_left_out_are_not_read() -> None:
    (query, key, value), options = make_case(p=0.3, kv_heads=4)
    left_out = ~keys_read(query, key, options).any(2)
    assert left_out.float().mean() > 0.1
    clean = attend((query, key, value), options)
    poisoned = value.detach().clone()
    poisoned[left_out] = float("nan")
    for one, other in zip(attend((query, key, poisoned), options), clean, strict=True):
        assert torch.equal(one, other)


def test_a_row_that_sees_a_nan_is_one() -> None:
    (query, key, value), options = make_case(sinks=1, window=1)
    with torch.no_grad():
        key[0, 0, 40] = float("nan")
    out, lse = top_p_attention(query, key, value, **options, return_lse=True)
    assert lse.isnan()[0, :2, 40:].all()
    assert out.isnan()[0, :2, 40:].all()
    assert out[0, :2, :40].isfinite().all()
    assert out[0, 2:].isfinite().all()


def test_a_packed_document_has_the_bits_of_one_alone() -> None:
    tensors, options = make_case(**CASES["packed"], dtype=torch.float32)
    whole = attend(tensors, options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in whole[:2]]
    for start, stop in pairwise(PACKED):
        if start == stop:
            continue
        part = slice(start, stop)
        leaves = [t.detach()[:, :, part].requires_grad_() for t in tensors]
        alone = top_p_attention(*leaves, **{**options, "cu_seqlens": None}, return_lse=True)
        grads = torch.autograd.grad(alone, leaves, [t[:, :, part] for t in cotangents])
        for one, other in zip((*alone, *grads), whole, strict=True):
            assert torch.equal(one, other[:, :, part])


def test_a_repetition_has_the_same_bits_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = make_case(**CASES["packed union"])
    whole = attend(tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(whole, attend(tensors, options), strict=True))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 700)
    for one, other in zip(whole, attend(tensors, options), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_no_square_tensor_is_built(monkeypatch: pytest.MonkeyPatch, largest_tensor) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2**15)
    tensors = make_inputs(2, 1, 1024, head_dim=8)
    assert largest_tensor(lambda: top_p_attention(*tensors, 0.9).sum().backward()) < 1024**2 / 8


def test_a_second_derivative_is_refused() -> None:
    query, key, value = make_inputs(2, 1, 20)
    (first,) = torch.autograd.grad(top_p_attention(query, key, value, 0.9).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


QUERY, KEY = torch.zeros(1, 4, 10, 8), torch.zeros(1, 2, 10, 8)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"p": 0.0}, "p=0.0 is no share of the weight"),
        ({"p": 1.5}, "p=1.5 is no share of the weight"),
        ({"p": "much"}, "p='much' is no number"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"window": 2.0}, "window=2.0 is no integer"),
        ({"q_start": 1}, "q_start=1 does not fit"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, r"cu_seqlens=\[0, 9\] must rise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        top_p_attention(QUERY, KEY, KEY, **{"p": 0.9, **wrong})
