"""Attention over a SparseK selection as PyTorch's operation: compiled, checkpointed, counted, refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from selected_cases import (
    BACKWARD,
    FORWARD,
    GATES,
    PACKED,
    Case,
    make_case,
)
from selected_oracle import Selection, select
from sparsetrain_kernels import (
    selected_attention,
    sparsek_attention,
)
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

# PyTorch's own tools.


def arguments(case: Case) -> tuple[Any, ...]:
    """Of the forward operation, without gradients."""
    o = case.options
    tensors = [tensor.detach().contiguous() for tensor in case.trained]
    return (*tensors, case.exit, o["cu_seqlens"], 0.25, o["topk"], o["window"], o["sinks"], o["gate"], "reference")


@pytest.mark.parametrize("bounds", [None, (0, 1, 12, 28, 28, 60)], ids=["one", "packed"])
@pytest.mark.parametrize("gate", GATES)
def test_the_operations_are_well_made(gate: str, bounds) -> None:
    args = arguments(make_case(tokens=60, gate=gate, bounds=bounds, shared=bounds is not None))
    torch.library.opcheck(FORWARD, args)
    out, lse = FORWARD(*args)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), out, lse, *args))


def test_one_compilation_serves_every_length_and_budget() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(selected_attention, fullgraph=True, dynamic=True, backend=counter)
    for tokens, topk in ((40, 12), (57, 8), (90, 21)):
        case = make_case(tokens=tokens, topk=topk)
        leaves, same = case.leaves(), case.leaves()
        out = attend(*leaves, case.exit, **case.options)
        expected = selected_attention(*same, case.exit, **case.options)
        assert torch.equal(out, expected)
        ours, theirs = (torch.autograd.grad(o.square().sum(), t) for o, t in ((out, leaves), (expected, same)))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_compiles_with_packed_documents(training: bool) -> None:
    case = make_case(bounds=PACKED)
    leaves = [tensor.detach().requires_grad_(training) for tensor in case.trained[:4]]
    layer = partial(sparsek_attention, topk=12, window=20, sinks=3, gate="log", cu_seqlens=case.options["cu_seqlens"])
    attend = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = attend(*leaves), layer(*leaves)
    assert torch.equal(out, expected)
    if training:
        ours, theirs = (torch.autograd.grad(o.square().sum(), leaves) for o in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_selective_checkpointing_can_keep_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.selected_keys import library

    calls: list[int] = []
    real = library.gathered_forward
    monkeypatch.setattr(library, "gathered_forward", lambda *args: calls.append(1) or real(*args))

    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    case = make_case(tokens=60)

    def train(**options: Any) -> tuple[Tensor, ...]:
        calls.clear()
        leaves = case.leaves()
        attend = partial(selected_attention, **case.options)
        out = checkpoint(lambda *t: attend(*t, case.exit).sin(), *leaves, use_reentrant=False, **options)
        return torch.autograd.grad(out.sum(), leaves)

    plain = train()
    assert len(calls) == 2
    kept = train(context_fn=partial(create_selective_checkpoint_contexts, keep))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("bounds", [None, PACKED], ids=["one", "packed"])
def test_flop_counters_count_the_pairs_seen(bounds) -> None:
    case = make_case(bounds=bounds, batch=1 if bounds else 2)
    selected = case.exit[:, :, None] > torch.arange(177)[:, None]
    rows = torch.arange(177)
    seen = (rows[:, None] >= rows) & (selected | (rows[:, None] - rows < 20))
    starts = torch.tensor([max(b for b in bounds or (0,) if b <= row) for row in range(177)])
    pairs = 2 * int((seen & (rows >= starts[:, None])).sum())
    with FlopCounterMode(display=False) as counter:
        selected_attention(*case.leaves(), case.exit, **case.options).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counts["sparsetrain.selected_fwd"] == 4 * 16 * pairs
    assert counts["sparsetrain.selected_bwd"] == 10 * 16 * pairs


def test_functional_gradients_work_and_second_ones_are_refused() -> None:
    case = make_case(tokens=40)
    query, *others = (tensor.detach() for tensor in case.trained)
    loss = lambda q: selected_attention(q, *others, case.exit, **case.options).square().sum()  # noqa: E731
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected)
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf) + first.square().sum(), leaf)


# Arguments.

QUERY, KEY = torch.zeros(1, 4, 10, 8), torch.zeros(1, 2, 10, 8)
SCORES, EXIT = torch.zeros(1, 2, 10), torch.zeros(1, 2, 10, dtype=torch.int32)
GOOD: dict[str, Any] = {
    "query": QUERY,
    "key": KEY,
    "value": KEY,
    "scores": SCORES,
    "threshold": SCORES,
    "exit": EXIT,
    "window": 4,
    "topk": 2,
}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"query": QUERY[:, :, :9]}, "query has 9 rows, but key has 10"),
        ({"query": QUERY[:, :3]}, "3 heads"),
        ({"scores": torch.zeros(1, 4, 10)}, r"scores has shape \(1, 4, 10\), expected \(1, 2, 10\)"),
        ({"scores": torch.zeros(1, 2, 9)}, r"scores has shape \(1, 2, 9\), expected \(1, 2, 10\)"),
        ({"scores": torch.zeros(2, 10)}, r"scores has shape \(2, 10\), expected \(1, 2, 10\)"),
        ({"scores": SCORES[:, :1]}, r"threshold has shape \(1, 2, 10\), but scores has \(1, 1, 10\)"),
        ({"exit": EXIT[:, :1]}, r"exit has shape \(1, 1, 10\), but scores has \(1, 2, 10\)"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"topk": 0}, "topk=0 must be at least 1"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"gate": "valeu"}, "gate='valeu' does not exist; did you mean 'value'"),
        ({"gate": "none"}, "gate='none' does not exist; choose one of value, log, straight"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, r"cu_seqlens=\[0, 9\]"),
        ({"backend": "gluon"}, "fp16 and bf16, not torch.float32; use backend='auto' or 'reference'"),
        ({"backend": "cuda"}, "backend='cuda' does not exist"),
    ],
    ids=str,
)
def test_wrong_values_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        selected_attention(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"scores": SCORES.bfloat16()}, "scores has dtype torch.bfloat16, expected torch.float32"),
        ({"scores": SCORES.double()}, "scores has dtype torch.float64, expected torch.float32"),
        ({"threshold": SCORES.half()}, "threshold has dtype torch.float16, expected torch.float32"),
        ({"exit": EXIT.long()}, "exit has dtype torch.int64, expected torch.int32"),
        ({"topk": 2.0}, "topk=2.0 is no integer"),
        ({"window": True}, "window=True is no integer"),
        ({"scores": SCORES.to("meta")}, "scores is on meta, but query is on cpu"),
    ],
    ids=str,
)
def test_wrong_types_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        selected_attention(**{**GOOD, **wrong})


@pytest.mark.skipif(not (TRITON_INSTALLED and INTERPRETING), reason="needs Triton's interpreter")
def test_what_the_kernels_cannot_do_is_refused() -> None:
    wide = {name: torch.zeros(*GOOD[name].shape[:3], 264) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="head_dim of up to 256, not 264"):
        selected_attention(**{**GOOD, **wide}, backend="triton")
    double = {name: GOOD[name].double() for name in ("query", "key", "value", "scores", "threshold")}
    with pytest.raises(ValueError, match=r"fp32, fp16 and bf16, not torch.float64"):
        selected_attention(**{**GOOD, **double}, backend="triton")


def test_the_oracle_of_the_selection_keeps_the_newest_of_equal_scores() -> None:
    selection: Selection = select(torch.zeros(1, 1, 8), 2, 1, 0, [0, 8])
    # Token j competes from row j + 1 on, and the two newest candidates stay.
    assert selection.exit.flatten().tolist() == [3, 4, 5, 6, 7, 8, 8, 8]
    assert selection.threshold.flatten()[:3].tolist() == [float("-inf")] * 3
    torch.testing.assert_close(selection.threshold.flatten()[3:], -2 / torch.arange(3.0, 8.0))
