"""Launches that skip what Triton looks at: only where it would find the kernel of an earlier launch again."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from sparsetrain_kernels.backend import TRITON_INSTALLED

if TRITON_INSTALLED:
    from sparsetrain_kernels import launching
    from sparsetrain_kernels.launching import _DIRECT, launch

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs triton")
STORAGE = torch.zeros(64, dtype=torch.bfloat16)
X, Y = STORAGE[:16], STORAGE[16:32]


class Kernel:
    """Stands in for one that Triton compiles, which takes a GPU: remembers which way it was launched, and with what."""

    arg_names = ("x_ptr", "y_ptr", "count", "SIZE", "EVEN")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ordinary(*args: Any, **constants: Any) -> Any:
            self.launches.append(("ordinary", grid, args, constants))
            return Compiled()

        class Compiled:
            function, packed_metadata = 11, (4, 1, 0)

            def run(_, *args: Any) -> None:
                grid, stream, function, metadata, hooks, rest = args[:3], args[3], args[4], args[5], args[6:9], args[9:]
                assert (stream, function, metadata, hooks) == (0, 11, (4, 1, 0), (None, None, None))
                self.launches.append(("compiled", grid, rest))

            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                way = "with hooks" if _DIRECT else "compiled"
                return lambda *args: self.launches.append((way, grid, args))

        return ordinary


def ways(*calls: dict[str, Any]) -> list[str]:
    kernel = Kernel()
    for call in calls:
        settled = {"programs": 7, "tensors": (X, Y), "numbers": (3,), "SIZE": 16, "EVEN": True, "num_warps": 4} | call
        launch(kernel, **settled)
    return [way for way, *_ in kernel.launches]


def test_a_repeated_launch_hands_addresses_numbers_and_constants_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    for programs, x in ((7, X), (9, Y)):
        launch(kernel, programs, (x, None), (programs,), EVEN=True, SIZE=16, num_warps=4)
    first, second = kernel.launches
    assert first == ("ordinary", (7,), (X, None, 7), {"EVEN": True, "SIZE": 16, "num_warps": 4})
    assert second == ("compiled", (9, 1, 1), (Y.data_ptr(), None, 9, 16, True))


def test_hooks_are_told_of_launches() -> None:
    if not _DIRECT:
        pytest.skip("every launch goes the way that tells hooks")
    import triton

    kernel = Kernel()
    for hooks in ([], [print], []):
        triton.knobs.runtime.launch_enter_hook.calls[:] = hooks
        launch(kernel, 7, (X, Y), (3,), SIZE=16, EVEN=True)
    assert [way for way, *_ in kernel.launches] == ["ordinary", "with hooks", "compiled"]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (X, Y.to(torch.float32))},
        {"tensors": (X, None)},
        {"numbers": (1,)},
        {"numbers": (32,)},
        {"numbers": (2**31 + 1,)},
        {"numbers": (3.0,)},
        {"SIZE": 32},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_looks_at_goes_the_ordinary_way_once_it_changes(change: dict[str, Any]) -> None:
    assert ways({}, change, {}, change) == ["ordinary", "ordinary", "compiled", "compiled"]


def test_arguments_that_triton_compiles_apart_are_launched_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton looks at arguments elsewhere")
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.nvidia.compiler import CUDABackend

    edges = [edge + step for edge in (0, 16, 2**31, -(2**31), 2**32, 2**63, -(2**63)) for step in (-1, 0, 1, 16)]
    numbers = [True, False, 0.0, 1.0, 16.0, *(edge for edge in edges if -(2**63) <= edge < 2**64)]
    # Nothing is written to the large one, so that it takes no memory.
    tensors = [torch.empty(4), torch.empty(4, dtype=torch.int8), torch.empty(2**31, dtype=torch.int8)]
    for backend, rocm in ((CUDABackend, False), (HIPBackend, True)):
        monkeypatch.setattr(launching, "_ROCM", rocm)

        def looked_at(argument: Any, backend: Any = backend) -> tuple[Any, ...]:
            return jit.native_specialize_impl(backend, argument, False, True, True)

        apart = [pair for pair in combinations(numbers, 2) if looked_at(pair[0]) != looked_at(pair[1])]
        assert apart
        for pair in apart:
            assert ways(*({"numbers": (number,)} for number in pair)) == ["ordinary", "ordinary"], pair
        for pair in combinations(tensors, 2):
            alike = looked_at(pair[0]) == looked_at(pair[1])
            found = ways(*({"tensors": (X, tensor)} for tensor in pair))
            assert found == ["ordinary", "compiled" if alike else "ordinary"], pair


def test_addresses_that_are_no_multiples_of_16_bytes_always_go_the_ordinary_way() -> None:
    odd = {"tensors": (X, STORAGE[17:33])}
    assert ways(odd, odd, {}, odd, {}) == ["ordinary", "ordinary", "ordinary", "ordinary", "compiled"]


def test_tiles_are_described_at_addresses_that_tma_takes() -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from sparsetrain_kernels.block_pattern.hopper.descriptors import tiles

    storage = torch.randn(2 * 3 * 128 * 64 + 8).to(torch.bfloat16)
    for start in (0, 1, 8):
        tensor = storage[start : start + 2 * 3 * 128 * 64].view(2, 3, 128, 64)
        for view in (tensor, tensor.transpose(0, 1), tensor.transpose(2, 3)):
            described = tiles(view, 64)
            assert torch.equal(described.base, view)
            assert described.base.data_ptr() % 16 == 0
            assert described.strides == list(described.base.stride())
        assert tiles(tensor, 64).base.data_ptr() == tensor.data_ptr() or start == 1
