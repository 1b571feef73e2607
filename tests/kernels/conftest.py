"""How an operation is compared with its oracle: forward and gradients, by the error that the dtype itself makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_oracle import Attention, assert_matches_oracle, make_inputs, outputs_and_gradients
from sparsetrain_kernels import block_pattern_attention
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(name="make_inputs")
def _make_inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return make_inputs


@pytest.fixture(name="outputs_and_gradients")
def _outputs_and_gradients() -> Callable[..., list[Tensor]]:
    return outputs_and_gradients


@pytest.fixture(name="assert_matches_oracle")
def _assert_matches_oracle() -> Callable[..., None]:
    return assert_matches_oracle


class Sparse:
    """Makes the operation for a pattern, by one backend, returning the log-sum-exp too."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, pattern: object) -> Attention:
        return partial(block_pattern_attention, pattern=pattern, return_lse=True, backend=self.backend)


@pytest.fixture(params=["reference", "triton"])
def sparse(request: pytest.FixtureRequest) -> Sparse:
    """Block-pattern attention by each backend; what the Triton kernels do not write stays NaN or nonsense."""
    if request.param == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        request.getfixturevalue("poisoned_allocations")
    return Sparse(request.param)


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory of the Triton launches holds NaN, and integers that no index may be."""
    from sparsetrain_kernels.block_pattern.triton import launch, work

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocated

    fake = SimpleNamespace(**{name: getattr(torch, name) for name in ("float32", "int32", "tensor", "cuda", "device")})
    fake.empty, fake.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    for module in (launch, work):
        monkeypatch.setattr(module, "torch", fake)


@pytest.fixture
def poison_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fresh memory of the modules given holds NaN, and integers that no index may be."""

    def fresh(*args: Any, **kwargs: Any) -> Tensor:
        tensor = torch.empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    fake = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    fake.empty = fresh
    fake.empty_like = lambda tensor: torch.empty_like(tensor).copy_(fresh(tensor.shape, dtype=tensor.dtype))

    def poison(*modules: Any) -> None:
        for module in modules:
            monkeypatch.setattr(module, "torch", fake)

    return poison


class _Largest(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture
def largest_tensor() -> Callable[[Callable[[], object]], int]:
    """Runs a function and returns the elements of the largest tensor allocated within it."""

    def measure(run: Callable[[], object]) -> int:
        with _Largest() as mode:
            run()
        return mode.elements

    return measure
