"""Timestep normalisation by the kernels: what plain PyTorch and autograd give, document by document."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from sparsetrain_kernels.score_placement import DocumentPositions, Moments, document_positions, place_scores
from torch import Tensor

SLOPE = 1e-3
DOCUMENTS = (0, 20, 20, 21, 64, 150)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN. Several blocks a head."""
    if not (TRITON_INSTALLED and INTERPRETING):
        pytest.skip("runs in Triton's interpreter, on machines without a GPU")
    from sparsetrain_kernels.score_placement.triton import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BLOCK", 32)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def problem(tokens: int = 150, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scores, laid out as a projection leaves them, and a gain a head."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(batch, tokens, 3, generator=generator, dtype=dtype) * 3 + 7
    gain = torch.rand(3, generator=generator, dtype=dtype) + 0.5
    return linear.transpose(1, 2).requires_grad_(), gain.requires_grad_()


def packed(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def placed(linear: Tensor, gain: Tensor, cu_seqlens: Tensor | None, backend: str) -> list[Tensor]:
    """Scores, moments and gradients."""
    places = document_positions(linear.shape[2], cu_seqlens, linear.device)
    scores, moments = place_scores(linear, gain[:, None].expand_as(linear), places, SLOPE, backend=backend)
    assert moments is not None
    assert scores.dtype == linear.dtype
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=scores.dtype)
    return [scores, *moments, *torch.autograd.grad(scores, (linear, gain), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "batch", "cu_seqlens"), [(150, 2, None), (150, 1, packed(*DOCUMENTS)), (1, 1, None)]
)
def test_kernels_give_what_plain_pytorch_gives(tokens, batch, cu_seqlens, dtype: torch.dtype) -> None:
    linear, gain = problem(tokens, batch, dtype)
    expected, actual = (placed(linear, gain, cu_seqlens, backend) for backend in ("reference", "triton"))
    for name, ours, plain in zip(("scores", "total", "squares", "grad linear", "grad gain"), actual, expected):
        # Sums in another order.
        tolerance = 3e-7 if plain.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("foreign", [1e30, float("nan"), float("inf")], ids=str)
def test_nothing_of_a_document_reaches_another(foreign: float) -> None:
    linear, gain = problem()
    whole = placed(linear, gain, packed(*DOCUMENTS), "triton")
    with torch.no_grad():
        linear[:, :, 21:64] = foreign
    disturbed = placed(linear, gain, packed(*DOCUMENTS), "triton")
    for index in (0, 3):
        for rows in (slice(0, 21), slice(64, 150)):
            assert torch.equal(disturbed[index][..., rows], whole[index][..., rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_one_token_a_row_goes_on_from_the_moments_of_those_before(batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    linear, gain = (tensor.detach() for tensor in problem(1, batch, dtype))
    gain = gain[:, None].expand_as(linear)
    # Of several tokens, none, and equal ones, whose variance rounds to less than 0.
    before = torch.randn(2, batch, 3, generator=generator, dtype=torch.float64)
    before[1] = before[1] ** 2 + before[0] ** 2
    lengths = torch.randint(1, 2000, (batch, 1), generator=generator)
    lengths[0], before[:, 0] = 0, 0
    places = DocumentPositions(lengths, None)
    moments = Moments(before[0].contiguous(), before[1].contiguous())
    found = [place_scores(linear, gain, places, SLOPE, moments, backend=name) for name in ("reference", "triton")]
    (plain, plain_after), (ours, after) = found
    assert plain_after is not None
    assert after is not None
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain, rtol=3e-7 if dtype == torch.float32 else 1e-10, atol=1e-7)
    assert torch.equal(after.total, plain_after.total)
    assert torch.equal(after.squares, plain_after.squares)
    assert torch.equal(moments.total, before[0])


def test_no_score_knows_what_comes_after_it() -> None:
    linear, gain = problem()
    places = document_positions(150, None, linear.device)
    (grad,) = torch.autograd.grad(
        place_scores(linear, gain[:, None].expand_as(linear), places, SLOPE, backend="triton")[0][..., :70].sum(),
        linear,
    )
    assert grad[..., :70].any()
    assert not grad[..., 70:].any()


def test_scores_that_are_all_alike_have_finite_gradients() -> None:
    linear, gain = problem()
    with torch.no_grad():
        linear.fill_(0.1)
    scores, _, _, grad_linear, grad_gain = placed(linear, gain, None, "triton")
    torch.testing.assert_close(scores, (SLOPE * torch.arange(150.0)).expand_as(scores), rtol=1e-5, atol=1e-5)
    assert grad_linear.isfinite().all()
    assert grad_gain.isfinite().all()


def test_runs_repeat_bit_for_bit() -> None:
    linear, gain = problem()
    first, second = (placed(linear, gain, packed(*DOCUMENTS), "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_the_operations_are_what_they_say_to_pytorch() -> None:
    tests = ("test_schema", "test_faketensor")
    linear, gain = (tensor.detach() for tensor in problem(40))
    places, gain = document_positions(40, packed(0, 10, 40), linear.device), gain[:, None].expand_as(linear)
    arguments = (linear, gain, *places)
    torch.library.opcheck(torch.ops.sparsetrain.place_scores, (*arguments, SLOPE), test_utils=tests)
    sums = torch.ops.sparsetrain.place_scores(*arguments, SLOPE)[1:]
    torch.library.opcheck(torch.ops.sparsetrain.place_scores_bwd, (linear, *arguments, *sums), test_utils=tests)
    one, position = linear[..., :1].contiguous(), torch.tensor([[7]])
    moments = (torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    arguments = (one, gain[..., :1], position, *moments, SLOPE)
    torch.library.opcheck(torch.ops.sparsetrain.place_next_score, arguments, test_utils=tests)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    linear, gain = problem()
    places = document_positions(150, None, linear.device)
    _, moments = place_scores(linear, gain[:, None].expand_as(linear), places, SLOPE)
    with pytest.raises(ValueError, match="whole documents"):
        place_scores(linear, gain[:, None].expand_as(linear), places, SLOPE, moments, backend="triton")
    with pytest.raises(ValueError, match="without a gain"):
        place_scores(linear, None, places, SLOPE, backend="triton")
