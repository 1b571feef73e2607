"""How much a SparseK layer asks of the device: at short lengths a step waits for the host that launches it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsetrain.methods.sparsek.method import SparseKConfig
from sparsetrain.methods.sparsek.scorer import SparseKScorer

pytestmark = pytest.mark.skipif(
    not (TRITON_INSTALLED and INTERPRETING), reason="counts launches in Triton's interpreter, on machines without a GPU"
)
HEADS, TOKENS, WIDTH, HEAD_DIM = 2, 96, 32, 16
DISPATCHERS = ("score_placement.op", "causal_selection.op", "causal_selection.statistics", "selected_keys.op")


class Launches(TorchDispatchMode):
    """Counts what a device would have to launch: PyTorch's operations, those within ours too, and Triton's kernels.

    Views, and memory that nobody fills, are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparsetrain":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        known = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = {_storage(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)} - known
        if func._schema.is_mutable or (made and "empty" not in func.name()):
            self.found[func.name()] += 1
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every operation takes its kernels, which are counted in place of running."""
    from triton.runtime.interpreter import InterpretedFunction

    mode = Launches()
    for name in DISPATCHERS:
        module = importlib.import_module(f"sparsetrain_kernels.{name}")
        monkeypatch.setattr(module, "choose_backend", lambda *args: "triton")

    def count(kernel: Any, *args: Any, **kwargs: Any) -> None:
        mode.found[kernel.fn.__name__] += 1

    monkeypatch.setattr(InterpretedFunction, "run", count)
    return mode


@pytest.fixture
def train(launches: Launches) -> Callable[..., Counter[str]]:
    """Forward and backward of one layer, from its input on: what they launch."""
    method = SparseKConfig(topk=16, window=8, sinks=2).build(HEADS)
    scorer = SparseKScorer(WIDTH, HEADS, normalize=True, trainable=True)
    layer = torch.nn.Module().train()
    layer.layer_idx = 0
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    query, key, value = (
        torch.randn(1, TOKENS, heads, HEAD_DIM, requires_grad=True).transpose(1, 2)
        for heads in (2 * HEADS, HEADS, HEADS)
    )

    def call(cu_seqlens: Tensor | None, *, observing: bool = False) -> Counter[str]:
        launches.found.clear()
        method.observing = observing
        with launches:
            scores, gain = scorer(x)
            options = {"cu_seqlens": cu_seqlens, "scale": 0.25}
            out = method.attend(layer, query, key, value, sparsek_scores=scores, sparsek_gain=gain, **options)
            torch.autograd.grad(out, [x, query, key, value, *scorer.parameters()], torch.empty_like(out))
        return launches.found.copy()

    return call


def test_a_training_call_issues_few_operations(train: Callable[..., Counter[str]]) -> None:
    found = train(None)
    assert found.total() <= 40, found


def test_telemetry_adds_few_operations(train: Callable[..., Counter[str]]) -> None:
    added = train(None, observing=True) - train(None)
    assert 0 < added.total() <= 5, added


def test_packed_documents_are_located_once_for_all_layers(train: Callable[..., Counter[str]]) -> None:
    cu_seqlens = torch.tensor([0, 30, TOKENS], dtype=torch.int32)
    first, later = train(cu_seqlens), train(cu_seqlens)
    assert first.total() <= 47, first
    assert later.total() <= 39, later
    assert later == train(cu_seqlens)
    # Documents that have changed in place are new ones.
    cu_seqlens[1] += 1
    assert train(cu_seqlens) == first
