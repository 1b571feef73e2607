"""Triton's interpreter gives the same when it replays what it noted."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sparsetrain_kernels.backend import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="Triton's interpreter runs on machines without a GPU")


@triton.jit
def products_kernel(x_ptr, y_ptr, square_ptr, product_ptr):
    places = tl.arange(0, 4)
    x = tl.load(x_ptr + places)
    y = tl.load(y_ptr + places)
    tl.store(square_ptr + places, x * x)
    tl.store(product_ptr + places, x * y)


def test_a_product_of_one_tensor_with_itself_is_not_that_of_two() -> None:
    x, y = torch.arange(1.0, 5.0), torch.arange(5.0, 9.0)
    square, product = torch.empty(4), torch.empty(4)
    products_kernel[(1,)](x, y, square, product)
    assert torch.equal(square, x * x)
    assert torch.equal(product, x * y)


@triton.jit
def loads_kernel(x_ptr, out_ptr, until):
    for i in range(4):
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < until, other=-1.0))
        tl.store(out_ptr + 4 + i, tl.load(x_ptr + i), mask=tl.load(x_ptr + i) > 2.0)


@pytest.mark.parametrize("until", [0, 2, 4])
def test_a_scalar_mask_decides_at_each_load_and_store(until: int) -> None:
    x, out = torch.arange(1.0, 5.0), torch.zeros(8)
    loads_kernel[(1,)](x, out, until)
    assert out.tolist() == [*x[:until], *[-1.0] * (4 - until), 0.0, 0.0, 3.0, 4.0]


@triton.jit
def constants_kernel(count_ptr, out_ptr):
    places = tl.arange(0, 2)
    count = tl.load(count_ptr + places)
    tl.store(out_ptr + places, count * 1)
    tl.store(out_ptr + 2 + places, count * 1.0)
    tl.store(out_ptr + 4 + places, count * 1)


def test_constants_that_python_calls_equal_are_told_apart() -> None:
    """An integer times 1.0 is a float of 32 bits."""
    count, out = torch.tensor([5, 2**24 + 1], dtype=torch.int32), torch.empty(6, dtype=torch.int32)
    constants_kernel[(1,)](count, out)
    assert out.tolist() == [5, 2**24 + 1, 5, 2**24, 5, 2**24 + 1]


@triton.jit
def programs_kernel(out_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out_ptr + program * BLOCK + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int32) + program)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_each_program_has_its_own_number_and_shape(block: int) -> None:
    out = torch.full((3 * block,), -1, dtype=torch.int32)
    programs_kernel[(3,)](out, block)
    assert out.tolist() == [program for program in range(3) for _ in range(block)]
