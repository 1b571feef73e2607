"""Attention over lists of keys as PyTorch's operation: compiled, checkpointed, counted, refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from listed_cases import PACKED, Case, make_case, seen_keys
from sparsetrain_kernels import listed_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

FORWARD = torch.ops.sparsetrain.listed_fwd.default
BACKWARD = torch.ops.sparsetrain.listed_bwd.default


def leaves_of(case: Case) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in case.trained]


@pytest.mark.parametrize("bounds", [None, PACKED], ids=["one", "packed"])
def test_the_operations_are_well_made(bounds) -> None:
    case = make_case(tokens=177, bounds=bounds, window=3)
    o = case.options
    tensors = [tensor.detach().contiguous() for tensor in case.trained]
    args = (*tensors, *case.lists, o["skip"], o["cu_seqlens"], 0.25, o["window"], o["sinks"], o["granule"], "reference")
    torch.library.opcheck(FORWARD, args)
    out, lse = FORWARD(*args)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), torch.zeros_like(lse), out, lse, *args))


def test_one_compilation_serves_every_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(listed_attention, fullgraph=True, dynamic=True, backend=counter)
    for tokens, capacity in ((90, 13), (57, 9), (120, 23)):
        case = make_case(tokens=tokens, capacity=capacity, window=2, head_dim=24)
        leaves, same = leaves_of(case), leaves_of(case)
        out = attend(*leaves, *case.lists, **case.options)
        expected = listed_attention(*same, *case.lists, **case.options)
        assert torch.equal(out, expected)
        ours, theirs = (torch.autograd.grad(o.square().sum(), t) for o, t in ((out, leaves), (expected, same)))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 1


def test_selective_checkpointing_can_keep_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.listed_keys import library

    calls: list[int] = []
    real = library.gathered_forward
    monkeypatch.setattr(library, "gathered_forward", lambda *args: calls.append(1) or real(*args))

    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    case = make_case(tokens=60)

    def train(**options: Any) -> tuple[Tensor, ...]:
        calls.clear()
        leaves = leaves_of(case)
        attend = partial(listed_attention, **case.options)
        out = checkpoint(lambda *t: attend(*t, *case.lists).sin(), *leaves, use_reentrant=False, **options)
        return torch.autograd.grad(out.sum(), leaves)

    plain = train()
    assert len(calls) == 2
    kept = train(context_fn=partial(create_selective_checkpoint_contexts, keep))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_flop_counters_count_the_pairs_seen() -> None:
    case = make_case(bounds=PACKED, window=4, sinks=2, granule=8, capacity=4)
    pairs = 2 * int(seen_keys(case).sum())
    with FlopCounterMode(display=False) as counter:
        listed_attention(*leaves_of(case), *case.lists, **case.options).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counts["sparsetrain.listed_fwd"] == 4 * 16 * pairs
    assert counts["sparsetrain.listed_bwd"] == 10 * 16 * pairs


def test_second_gradients_are_refused() -> None:
    case = make_case(tokens=40)
    leaves = leaves_of(case)
    (first,) = torch.autograd.grad(
        listed_attention(*leaves, *case.lists, **case.options).square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


QUERY, KEY = torch.zeros(1, 4, 10, 8), torch.zeros(1, 2, 10, 8)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
GOOD: dict[str, Any] = {
    "query": QUERY,
    "key": KEY,
    "value": KEY,
    "lists": torch.zeros(1, 2, 2, 3, dtype=torch.int32),
    "counts": torch.zeros(1, 2, 2, dtype=torch.int32),
    "cu_segments": CU,
}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"query": QUERY[:, :, :9]}, "query has 9 rows, but key has 10"),
        ({"query": QUERY[:, :3]}, "3 heads"),
        ({"lists": [0]}, "lists is a list"),
        ({"lists": GOOD["lists"][:, :1]}, r"lists has shape \(1, 1, 2, 3\), expected"),
        ({"lists": GOOD["lists"][..., :0]}, "at least 1 place"),
        ({"lists": GOOD["lists"].long()}, "lists has dtype torch.int64, expected torch.int32"),
        ({"counts": GOOD["counts"][..., :1]}, r"counts has shape \(1, 2, 1\), expected \(1, 2, 2\)"),
        ({"counts": GOOD["counts"].float()}, "counts has dtype torch.float32"),
        ({"cu_segments": CU[:1]}, "cu_segments has shape"),
        ({"cu_segments": CU.long()}, "cu_segments has dtype torch.int64"),
        ({"cu_segments": CU + 1}, r"cu_segments=\[1, 5, 11\] must rise from 0 to the number of tokens, 10"),
        ({"skip": -1}, "skip=-1 must be at least 0"),
        ({"skip": 1.0}, "skip=1.0 is no integer"),
        ({"skip": CU}, r"skip has shape \(3,\), expected \(2,\)"),
        ({"skip": torch.tensor([0, -2], dtype=torch.int32)}, "must not be negative"),
        ({"window": -1}, "window=-1 must be at least 0"),
        ({"sinks": 1.5}, "sinks=1.5 is no integer"),
        ({"granule": 3}, "granule=3 must be a power of two"),
        ({"granule": 128}, "granule=128 must be a power of two of at most 64"),
        ({"cu_seqlens": torch.tensor([0, 3, 10], dtype=torch.int32)}, "segment 0 has rows 0 to 3, but a document ends"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"backend": "gluon"}, "there is no Hopper version"),
        (
            {"query": torch.zeros(1, 258, 10, 8), "backend": "triton"},
            "up to 128 query heads a KV head, not 129",
        ),
        ({"backend": "tritan"}, "backend='tritan' does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        listed_attention(**{**GOOD, **wrong})
