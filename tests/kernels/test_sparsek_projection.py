"""SPARSEK of a vector: a projection, by each method and backend equal to the oracle, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sparsek_oracle import project
from sparsek_oracle import threshold as exact_threshold
from sparsetrain_kernels import sparsek, sparsek_threshold
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor

Project = Callable[..., Tensor]
SCALES = (1e-6, 0.1, 1.0, 10.0, 1e3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(z: Tensor, k: float) -> Tensor:
    return torch.tensor(np.array([project(row, k) for row in z.double().numpy()]))


@pytest.fixture(params=["sort", "bisect"])
def exact(request: pytest.FixtureRequest) -> Project:
    """Plain PyTorch by each method, for fp64."""
    return partial(sparsek, method=request.param)


@pytest.fixture(params=["sort", "bisect", "triton"])
def single(request: pytest.FixtureRequest) -> Project:
    """Every implementation, for fp32."""
    if request.param != "triton":
        return partial(sparsek, method=request.param, backend="reference")
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    return partial(sparsek, backend="triton")


@pytest.mark.parametrize("k", [0.3, 1, 2.5, 12, 23, 24])
def test_is_the_projection_in_double_precision(exact: Project, k: float) -> None:
    for seed, scale in enumerate(SCALES):
        z = normal(4, 24, seed=seed) * scale
        p = exact(z, k)
        assert ((p >= 0) & (p <= 1)).all()
        torch.testing.assert_close(p.sum(-1), torch.full((4,), float(k), dtype=p.dtype), rtol=0, atol=1e-11)
        torch.testing.assert_close(p, oracle(z, k), rtol=0, atol=1e-12 * max(1, scale))


@pytest.mark.parametrize("k", [0.3, 2.5, 12, 23])
def test_is_the_projection_in_single_precision(single: Project, k: float) -> None:
    for seed, scale in enumerate(SCALES):
        z = normal(2, 24, seed=seed, dtype=torch.float32) * scale + (1e4 if seed == 1 else 0)
        torch.testing.assert_close(single(z, k).double(), oracle(z, k), rtol=0, atol=1e-6)


def test_ties_share_what_is_left(single: Project) -> None:
    z = torch.tensor([[3.0, 1.0, 1.0, 1.0, -2.0]])
    torch.testing.assert_close(single(z, 2), torch.tensor([[1.0, 1 / 3, 1 / 3, 1 / 3, 0.0]]))
    torch.testing.assert_close(single(torch.zeros(1, 7), 3), torch.full((1, 7), 3 / 7))


def test_one_is_sparsemax(exact: Project) -> None:
    z = normal(6, 30, seed=1)
    ascending = z.flip(-1).sort(-1, descending=True).values
    count = torch.arange(1, 31)
    support = (1 + count * ascending > ascending.cumsum(-1)).sum(-1, keepdim=True)
    tau = (ascending.cumsum(-1).gather(-1, support - 1) - 1) / support
    torch.testing.assert_close(exact(z, 1), (z - tau).clamp(min=0), rtol=0, atol=1e-14)


def test_as_many_as_there_are_gives_ones(single: Project) -> None:
    z = normal(3, 9, dtype=torch.float32)
    assert (single(z, 9) == 1).all()
    mask = torch.arange(9) < torch.tensor([[2], [0], [7]])
    assert torch.equal(single(z, 7.5, mask=mask), mask.float())


def test_symmetries(exact: Project) -> None:
    z = normal(5, 20, seed=2)
    p = exact(z, 6.5)
    torch.testing.assert_close(exact(z + 100, 6.5), p, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact(-z, 20 - 6.5), 1 - p, rtol=0, atol=1e-13)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exact(z[:, order], 6.5), p[:, order], rtol=0, atol=1e-14)


def test_low_temperature_and_wide_gaps_give_hard_topk(exact: Project) -> None:
    z = normal(5, 20, seed=3)
    hard = torch.zeros_like(z).scatter(-1, z.topk(4).indices, 1.0)
    torch.testing.assert_close(exact(z / 1e-4, 4), hard, rtol=0, atol=1e-11)
    apart = z.argsort(-1).argsort(-1).double() * 1.25
    apart.requires_grad_()
    p = exact(apart, 4)
    torch.testing.assert_close(p, hard, rtol=0, atol=1e-14)
    (p * normal(5, 20, seed=4)).sum().backward()
    assert not apart.grad.any()


def test_brings_no_two_points_apart_and_supports_the_topk(exact: Project) -> None:
    a, b = normal(200, 12, seed=5), normal(200, 12, seed=6)
    p, q = exact(a, 3.0), exact(b, 3.0)
    assert ((p - q).norm(dim=-1) <= (a - b).norm(dim=-1) + 1e-13).all()
    assert (p.gather(-1, a.topk(3).indices) > 0).all()


def test_jacobian_is_a_projection_onto_what_is_inside(exact: Project) -> None:
    z = normal(15, seed=7)
    p = exact(z, 5.0)
    inside = ((p > 0) & (p < 1)).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: exact(z, 5.0), z)
    assert inside.sum() > 2
    torch.testing.assert_close(jacobian, jacobian.T)
    torch.testing.assert_close(jacobian @ jacobian, jacobian)
    torch.testing.assert_close(jacobian.sum(1), torch.zeros_like(z), rtol=0, atol=1e-15)
    assert torch.linalg.matrix_rank(jacobian) == inside.sum() - 1
    torch.testing.assert_close(jacobian, inside.diag() - torch.outer(inside, inside) / inside.sum())


def test_gradients_equal_finite_differences(exact: Project) -> None:
    z, k = normal(2, 3, 9, seed=8).requires_grad_(), torch.tensor([[1.5], [4.0]], dtype=torch.float64).requires_grad_()
    mask = torch.arange(9)[:, None] != 4
    # Three entries along dim 1 are too few for the second k: its rows are ones.
    assert torch.autograd.gradcheck(lambda z, k: exact(z, k, mask=mask.T), (z, k))
    assert torch.autograd.gradcheck(lambda z: exact(z, 1.5, dim=1), (z,))


def test_gradients_agree_between_implementations(single: Project) -> None:
    z, weight = normal(3, 33, 4, seed=9, dtype=torch.float32), normal(3, 33, 4, seed=10, dtype=torch.float32)
    mask = torch.arange(33)[:, None] != 3

    def gradients(project: Project, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = z.to(dtype).requires_grad_(), torch.tensor([[1.0], [5.0], [9.5]], dtype=dtype).requires_grad_()
        p = project(leaves[0], leaves[1], dim=1, mask=mask)
        return torch.autograd.grad((p * weight).sum(), leaves)

    expected = gradients(partial(sparsek, backend="reference"), torch.float64)
    for actual, exact_gradient in zip(gradients(single, torch.float32), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact_gradient, rtol=0, atol=3e-6)


def test_long_rows_that_are_read_again_equal_held_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETING:
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels.sparsek_projection.triton import launch

    z, weight = normal(2, 300, seed=11, dtype=torch.float32), normal(2, 300, seed=12, dtype=torch.float32)
    results = []
    for held, block in ((512, 512), (64, 64)):
        monkeypatch.setattr(launch, "HELD", held)
        monkeypatch.setattr(launch, "BLOCK", block)
        leaf = z.clone().requires_grad_()
        p = sparsek(leaf, 40, backend="triton")
        results.append((p.detach(), *torch.autograd.grad((p * weight).sum(), leaf)))
    for held_once, read_again in zip(*results, strict=True):
        torch.testing.assert_close(read_again, held_once, rtol=0, atol=1e-6)


def test_dim_mask_and_k_go_by_position() -> None:
    z = normal(2, 7, 3, 4, seed=13)
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    mask = normal(7, 1, 4, seed=14) > -0.5
    p = sparsek(z, k, dim=1, mask=mask)
    tau = sparsek_threshold(z, k, 1, mask)
    assert tau.shape == (2, 3, 4)
    for a, b, c in np.ndindex(2, 3, 4):
        there = mask[:, 0, c]
        entries = z[a, there, b, c].numpy()
        torch.testing.assert_close(p[a, there, b, c], torch.tensor(project(entries, float(k[b]))), rtol=0, atol=1e-13)
        assert not p[a, ~there, b, c].any()
        assert tau[a, b, c].item() == pytest.approx(exact_threshold(entries, float(k[b])), abs=1e-13)


def test_threshold_is_minus_infinity_where_all_are_ones() -> None:
    z = normal(3, 6, dtype=torch.float32)
    assert (sparsek_threshold(z, 6) == -torch.inf).all()
    tau = sparsek_threshold(z, 3, mask=torch.arange(6) < torch.tensor([[2], [0], [5]]))
    assert tau.isinf().tolist() == [True, True, False]
    assert tau.dtype == torch.float32


def test_half_precision_is_computed_in_single() -> None:
    z = normal(4, 500, seed=15).bfloat16()
    p = sparsek(z, 60)
    assert p.dtype == torch.bfloat16
    assert torch.equal(p, sparsek(z.float(), 60).bfloat16())
    assert sparsek_threshold(z, 60).dtype == torch.float32


def test_nan_and_infinity_make_their_row_nan(single: Project) -> None:
    z = torch.tensor([[1.0, float("nan"), 2.0], [1.0, torch.inf, 2.0], [1.0, -torch.inf, 2.0], [1.0, 1.5, 2.0]])
    z.requires_grad_()
    p = single(z, 1.5)
    assert p[:2].isnan().all()
    torch.testing.assert_close(p[2:], torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.5, 1.0]]))
    p.sum().backward()
    assert z.grad[:2].isnan().all()
    assert z.grad[2:].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    z = normal(2, 8).requires_grad_()
    (grad,) = torch.autograd.grad(sparsek(z, 2.5).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda z: sparsek(z, 1.7).pow(3).sum(), z.detach()[0])


@pytest.mark.parametrize("needs_grad", [True, False])
def test_compiles_as_one_graph(needs_grad: bool) -> None:
    def gates(z: Tensor, k: Tensor) -> Tensor:
        return sparsek(z * 2, k, dim=0) * 3

    z, k = normal(9, 2).requires_grad_(needs_grad), torch.tensor([1.5, 3.0], dtype=torch.float64)
    p = torch.compile(gates, fullgraph=True, backend="aot_eager")(z, k)
    torch.testing.assert_close(p, gates(z, k), rtol=0, atol=0)
    if needs_grad:
        weight = normal(9, 2, seed=1)
        grads = [torch.autograd.grad((output * weight).sum(), z)[0] for output in (p, gates(z, k))]
        assert grads[0].any()
        assert torch.equal(*grads)


Z = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"z": Z.int()}, TypeError, "z has dtype torch.int32"),
        ({"z": Z.tolist()}, TypeError, "z is a list, expected a tensor"),
        ({"mask": [True]}, TypeError, "mask is a list, expected a tensor"),
        ({"k": "3"}, TypeError, "k='3' is no number"),
        ({"k": True}, TypeError, "k=True is no number"),
        ({"dim": 1.0}, TypeError, "dim=1.0 is no integer"),
        ({"z": Z[:0]}, ValueError, r"shape \(0, 4\) and no entries"),
        ({"dim": 2}, IndexError, r"dim=2 does not exist.*\(3, 4\)"),
        ({"k": 0}, ValueError, "k=0 must be positive"),
        ({"k": float("nan")}, ValueError, "k=nan must be positive"),
        ({"k": 4.5}, ValueError, "k=4.5 is more than the 4 entries"),
        ({"k": torch.tensor([1.0, 1.0, -1.0])}, ValueError, "k=-1.0 must be positive"),
        ({"k": torch.tensor([1.0, 5.0, 1.0])}, ValueError, "k=5.0 is more than the 4 entries"),
        ({"k": torch.ones(4)}, ValueError, r"k has shape \(4,\).*\(3,\)"),
        ({"mask": Z}, TypeError, "mask has dtype torch.float32, expected bool"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask of shape \(5,\) does not broadcast"),
        ({"mask": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, r"mask of shape \(2, 3, 4\)"),
        ({"method": "newton"}, ValueError, "method='newton' does not exist; choose one of sort, bisect"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' does not exist"),
        ({"backend": "gluon"}, ValueError, "no Gluon kernels"),
        ({"z": Z.double(), "backend": "triton"}, ValueError, "fp32, fp16 and bf16, not torch.float64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparsek(**{"z": Z, "k": 1, **arguments})
