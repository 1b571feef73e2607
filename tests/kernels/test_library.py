"""Block-pattern attention as PyTorch's own tools see it: compiler, checkpointing, FLOP counter, operator checks."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from attention_oracle import make_inputs
from sparsetrain_kernels import block_pattern_attention
from sparsetrain_kernels.block_pattern.pattern import block_lists
from sparsetrain_kernels.inputs import Document
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.methods.ruler import RulerPattern
from sparsetrain.patterns import (
    DilatedPattern,
    FullPattern,
    HeadDistancePattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

POWER = PowerPattern(16, 2, 1)
LONGNET = LongNetPattern(16, ((2, 1), (4, 2)), head_shift=True, num_heads=2)
PACKED = torch.tensor([0, 1, 12, 28, 28, 90], dtype=torch.int32)
FORWARD = torch.ops.sparsetrain.block_pattern_fwd.default
BACKWARD = torch.ops.sparsetrain.block_pattern_bwd.default


def arguments(cu_seqlens: torch.Tensor | None = None, rows: int = 90):
    """Of the forward operation, without gradients."""
    query, key, value = (tensor.detach() for tensor in make_inputs(4, 2, rows))
    lists = block_lists(POWER, -(-rows // 16), 2)
    return (query, key, value, cu_seqlens, 0, 0.25, None, None, *lists, "reference", 0)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["one", "packed"])
def test_the_operations_are_well_made(cu_seqlens) -> None:
    args = arguments(cu_seqlens)
    torch.library.opcheck(FORWARD, args)
    out, lse = FORWARD(*args)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), out, lse, *args))
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), None, out, lse, *args))


@pytest.mark.parametrize("pattern", [POWER, LONGNET], ids=repr)
def test_one_compilation_serves_every_length(pattern) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(
        partial(block_pattern_attention, pattern=pattern), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in (40, 57, 90, 161):
        tensors, same = make_inputs(4, 2, rows), make_inputs(4, 2, rows)
        out, expected = attend(*tensors), block_pattern_attention(*same, pattern)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, same, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_compile(training: bool) -> None:
    attend = torch.compile(partial(block_pattern_attention, pattern=POWER), fullgraph=True, backend="aot_eager")
    tensors = [tensor.detach().requires_grad_(training) for tensor in make_inputs(4, 2, 90)]
    out = attend(*tensors, cu_seqlens=PACKED)
    assert torch.equal(out, block_pattern_attention(*tensors, POWER, cu_seqlens=PACKED))


def test_a_pattern_made_while_compiling_keeps_its_own_numbers() -> None:
    def attend(query, key, value):
        # Not the defaults of its class, which is what Dynamo shows of an object that it only pretends to make.
        return block_pattern_attention(query, key, value, PowerPattern(16, 2, 1))

    tensors = make_inputs(4, 2, 90)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attend(*tensors))


def test_equal_patterns_share_a_compilation() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(block_pattern_attention, fullgraph=True, dynamic=True, backend=counter)
    for pattern in [PowerPattern(16, 2, 1), PowerPattern(16, 2, 1)]:
        attend(*make_inputs(4, 2, 90), pattern)
    assert counter.frame_count == 1


def test_selective_checkpointing_can_keep_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.block_pattern import library

    calls: list[int] = []
    real = library.gather_forward
    monkeypatch.setattr(library, "gather_forward", lambda *args: calls.append(1) or real(*args))

    def keep(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def train(**options) -> tuple[torch.Tensor, ...]:
        calls.clear()
        tensors = make_inputs(4, 2, 60)
        attend = partial(block_pattern_attention, pattern=POWER)
        out = checkpoint(lambda *t: attend(*t).sin(), *tensors, use_reentrant=False, **options)
        return torch.autograd.grad(out.sum(), tensors)

    plain = train()
    assert len(calls) == 2
    kept = train(context_fn=partial(create_selective_checkpoint_contexts, keep))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


class Seen(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operations_of_either_pass() -> None:
    tensors = make_inputs(4, 2, 90)
    with Seen() as forward:
        out = block_pattern_attention(*tensors, POWER)
    with Seen() as backward:
        grads = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert [str(FORWARD) in forward.names, str(BACKWARD) in backward.names] == [True, True]
    plain = block_pattern_attention(*tensors, POWER)
    assert torch.equal(out, plain)
    assert all(map(torch.equal, grads, torch.autograd.grad(plain.sum(), tensors)))


@pytest.mark.parametrize(
    ("rows", "keys", "options"),
    [(90, 90, {}), (90, 90, {"cu_seqlens": PACKED}), (20, 90, {"q_start": 37})],
    ids=["one", "packed", "behind a cache"],
)
def test_flop_counters_count_the_visible_pairs(rows: int, keys: int, options) -> None:
    pattern = HeadDistancePattern(16, ((0, 1, 4), (0, 3)), 1)
    tensors = make_inputs(4, 2, rows, keys)
    pairs = 0
    bounds = PACKED.tolist() if "cu_seqlens" in options else [0, rows]
    for low, high in pairwise(bounds):
        for head in (0, 0, 1, 1):
            if high > low:
                last = high - low + options.get("q_start", 0)
                pairs += int(pattern.token_mask(high - low, last, head=head).sum())
    with FlopCounterMode(display=False) as counter:
        block_pattern_attention(*tensors, pattern, **options).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert counts["sparsetrain.block_pattern_fwd"] == 4 * 16 * pairs
    assert counts["sparsetrain.block_pattern_bwd"] == 10 * 16 * pairs


def test_functional_gradients_work_and_second_ones_are_refused() -> None:
    query, key, value = (tensor.detach() for tensor in make_inputs(2, 1, 40))
    loss = lambda q: block_pattern_attention(q, key, value, POWER).square().sum()  # noqa: E731
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query), expected)
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf) + first.square().sum(), leaf)


def test_rows_of_scattered_elements_and_expanded_gradients_equal_the_plain_ones(sparse) -> None:
    tensors = make_inputs(2, 1, 40)
    scattered = [t.detach().mT.contiguous().mT.requires_grad_() for t in tensors]
    assert all(t.stride(-1) != 1 for t in scattered)
    out, _ = sparse(POWER)(*tensors)
    same, _ = sparse(POWER)(*scattered)
    assert torch.equal(out, same)
    plain = torch.autograd.grad(out, tensors, torch.ones_like(out))
    expanded = torch.autograd.grad(same.sum(), scattered)
    assert all(torch.equal(a, b) for a, b in zip(plain, expanded, strict=True))


def test_one_input_may_need_a_gradient_alone(sparse) -> None:
    query, key, value = make_inputs(2, 1, 40)
    out, _ = sparse(POWER)(query, key, value)
    (expected,) = torch.autograd.grad(out.sum(), key)
    leaf = key.detach().requires_grad_()
    out, _ = sparse(POWER)(query.detach(), leaf, value.detach())
    out.sum().backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    "pattern",
    [
        POWER,
        FullPattern(4),
        SlidingPattern(4, 3, 2),
        StridePattern(4, 2, 1, 3),
        DilatedPattern(4, 3, 2),
        LongNetPattern(4, ((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=3),
        HeadDistancePattern(4, ((0, 1, 4), (0, 3), (0,)), 1),
        PowerPattern(4, 2, 1, base=4, farthest=12),
        RulerPattern(4, 2, 1, keep=2, levels=3),
    ],
    ids=repr,
)
def test_a_pattern_survives_as_numbers(pattern) -> None:
    lists = block_lists(pattern, 50, len(pattern.heads))
    for head in pattern.heads:
        for t in range(50):
            assert lists.key_blocks(t, head) == pattern.key_blocks(t, head)
        for j in range(pattern.num_sinks, 50):
            start = (head * lists.period + j % lists.period) * lists.width
            far = [j + d for d in lists.far_back[start : start + lists.width] if j + d < 50]
            near = range(j, min(j + lists.window, 50))
            assert (*near, *far) == pattern.query_blocks(j, 50, head)
    document = Document(0, 23, 31, 0)
    seen = sum(int(pattern.token_mask(23, 54, head=head).sum()) for head in pattern.heads)
    assert lists.visible_pairs(document) == seen


def test_a_pattern_for_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="3 KV heads, but key has 2"):
        block_pattern_attention(*make_inputs(4, 2, 40), HeadDistancePattern(4, ((0,), (0, 1), (0, 2)), 0))
