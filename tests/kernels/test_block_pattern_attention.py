"""Block-pattern attention equals its dense-mask oracle, and keeps what it promises beyond that.

Both implementations: gathered blocks in plain PyTorch, and the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from sparsetrain_kernels import (
    block_pattern_attention,
    block_pattern_attention_dense,
    causal_attention_dense,
    gather,
)
from sparsetrain_kernels.block_pattern.triton import work

from sparsetrain.patterns import (
    DilatedPattern,
    DistancePattern,
    FullPattern,
    HeadDistancePattern,
    LongNetPattern,
    PowerPattern,
    SlidingPattern,
    StridePattern,
)

POWER = PowerPattern(16, 2, 1)
PATTERNS = [
    POWER,
    PowerPattern(16, 1, 0),
    FullPattern(16),
    SlidingPattern(16, 2, 3),
    StridePattern(16, 2, 1, 3),
    DilatedPattern(16, 3, 2),
    LongNetPattern(16, ((2, 1), (4, 2), (8, 4))),
    LongNetPattern(16, ((2, 1), (4, 2), (8, 4)), head_shift=True, num_heads=2),
    DistancePattern(16, (0, 3), 2),
    HeadDistancePattern(16, ((0, 1, 4), (0, 3)), 1),
]
PACKED = torch.tensor([0, 1, 12, 28, 28, 100, 177], dtype=torch.int32)


def oracle(pattern):
    return partial(block_pattern_attention_dense, pattern=pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["one", "packed"])
def test_equals_the_oracle_for_every_pattern(sparse, pattern, cu_seqlens, make_inputs, assert_matches_oracle) -> None:
    heads = (4, 2) if pattern.per_head else (2, 1)  # every group of heads has a test of its own below
    tensors = make_inputs(*heads, 177)
    assert_matches_oracle(sparse(pattern), oracle(pattern), tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_oracle_in_every_dtype(dtype, sparse, make_inputs, assert_matches_oracle) -> None:
    if sparse.backend == "triton" and dtype in (torch.float64, torch.bfloat16):
        pytest.skip("no fp64 kernels; Triton's interpreter computes bf16 wrongly, so that it is tested on a GPU")
    tensors = make_inputs(4, 2, 120, dtype=dtype, batch=2)
    assert_matches_oracle(sparse(POWER), oracle(POWER), tensors)


@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_equals_the_oracle_for_every_group_of_heads(sparse, group: int, make_inputs, assert_matches_oracle) -> None:
    tensors = make_inputs(2 * group, 2, 60, batch=2)
    assert_matches_oracle(sparse(POWER), oracle(POWER), tensors)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 160, 161])
def test_equals_the_oracle_at_ragged_lengths(sparse, rows: int, make_inputs, assert_matches_oracle) -> None:
    assert_matches_oracle(sparse(POWER), oracle(POWER), make_inputs(2, 1, rows))


@pytest.mark.parametrize(("rows", "q_start"), [(1, None), (1, 40), (5, 30), (40, None), (40, 7), (100, 100), (33, 0)])
def test_equals_the_oracle_behind_a_cache(sparse, rows: int, q_start, make_inputs, assert_matches_oracle) -> None:
    tensors = make_inputs(4, 2, rows, 200, batch=2)
    assert_matches_oracle(sparse(POWER), oracle(POWER), tensors, q_start=q_start)


@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        ({"softcap": 1.5, "scale": 0.7}, False),
        ({"softcap": 1.5, "scale": 0.7}, True),
        ({"softcap": 2.0, "cu_seqlens": PACKED}, False),
        ({"softcap": 2.0, "cu_seqlens": PACKED}, True),
        ({"scale": 0.7, "cu_seqlens": PACKED}, True),
    ],
    ids=str,
)
def test_equals_the_oracle_with_soft_cap_scale_and_sink_logits(
    sparse, options, sinks: bool, make_inputs, assert_matches_oracle
) -> None:
    tensors = make_inputs(4, 2, 177)
    if sinks:
        # From negligible to dominant beside the logits.
        tensors = (*tensors, torch.tensor([-5.0, 0.0, 3.0, 60.0]))
    assert_matches_oracle(sparse(POWER), oracle(POWER), tensors, **options)


@pytest.mark.parametrize("chunk_elements", [1, 20_000])
@pytest.mark.parametrize("pattern", [POWER, PATTERNS[-3]], ids=repr)
def test_the_cut_of_plain_pytorch_into_chunks_changes_nothing(
    pattern, chunk_elements: int, monkeypatch, make_inputs, assert_matches_oracle
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ELEMENTS", chunk_elements)
    sparse = partial(block_pattern_attention, pattern=pattern, return_lse=True, backend="reference")
    assert_matches_oracle(sparse, oracle(pattern), make_inputs(4, 2, 90, batch=2))
    assert_matches_oracle(sparse, oracle(pattern), make_inputs(4, 2, 177), cu_seqlens=PACKED)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["one", "packed"])
def test_split_sink_columns_equal_the_oracle(
    sparse, cu_seqlens, monkeypatch, make_inputs, assert_matches_oracle
) -> None:
    monkeypatch.setattr(work, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(work, "MAX_CHUNKS", 100)
    assert_matches_oracle(sparse(POWER), oracle(POWER), make_inputs(2, 1, 177), cu_seqlens=cu_seqlens)


@dataclass(frozen=True)
class OneBlockShifted:
    """The pattern with one listed block of one query block in 64, the 10th, replaced by its neighbour."""

    original: PowerPattern
    block: int = 16
    per_head: bool = False
    heads: range = range(1)
    num_sinks: int = 1
    period: int = 64

    def key_blocks(self, query_block: int, head: int = 0) -> tuple[int, ...]:
        blocks = self.original.key_blocks(query_block)
        return tuple(j + 1 if query_block % 64 == 10 and query_block - j == 8 else j for j in blocks)


def test_the_comparison_notices_one_wrong_block(sparse, make_inputs, assert_matches_oracle) -> None:
    assert 2 in POWER.key_blocks(10)
    assert 3 not in POWER.key_blocks(10)
    with pytest.raises(AssertionError, match="out: "):
        assert_matches_oracle(
            sparse(OneBlockShifted(POWER)), oracle(POWER), make_inputs(2, 1, 190, dtype=torch.bfloat16)
        )


@pytest.mark.parametrize("extras", [False, True])
def test_gradients_are_the_derivatives(extras: bool, make_inputs) -> None:
    pattern = PowerPattern(3, 1, 1)
    tensors = make_inputs(2, 1, 7, 14, head_dim=3, dtype=torch.float64)
    options = {"q_start": 6, "softcap": 1.3 if extras else None, "return_lse": True}
    if extras:
        tensors = (*tensors, torch.randn(2, dtype=torch.float64).requires_grad_())

    def run(query, key, value, sink_logits=None):
        return block_pattern_attention(query, key, value, pattern, sink_logits=sink_logits, **options)

    assert torch.autograd.gradcheck(run, tensors)


def test_one_token_returns_its_value(make_inputs) -> None:
    query, key, value = make_inputs(2, 2, 1)
    out, lse = block_pattern_attention(query, key, value, PowerPattern(), return_lse=True)
    assert torch.equal(out, value)
    torch.testing.assert_close(lse, (query * key).sum(-1) * 0.25)


def test_a_window_as_long_as_the_sequence_is_dense_causal(sparse, make_inputs, assert_matches_oracle) -> None:
    tensors = make_inputs(4, 2, 77)
    assert_matches_oracle(sparse(PowerPattern(16, 5, 0)), causal_attention_dense, tensors)
    assert_matches_oracle(sparse(DistancePattern(16, tuple(range(5)), 0)), causal_attention_dense, tensors)


def test_without_far_blocks_power_is_sliding(sparse, make_inputs, outputs_and_gradients) -> None:
    tensors = make_inputs(2, 1, 100)
    near = outputs_and_gradients(sparse(DistancePattern(16, (0, 1, 2), 1)), tensors)
    sliding = outputs_and_gradients(sparse(SlidingPattern(16, 3, 1)), tensors)
    power = outputs_and_gradients(sparse(PowerPattern(16, 3, 1)), tensors)
    assert all(torch.equal(a, b) for a, b in zip(near, sliding, strict=True))
    assert not torch.allclose(power[0], sliding[0])


def test_packed_documents_equal_separate_runs_and_do_not_leak(make_inputs) -> None:
    query, key, value = make_inputs(4, 2, 177)
    packed = block_pattern_attention(query, key, value, POWER, cu_seqlens=PACKED)
    bounds = PACKED.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            alone = block_pattern_attention(*(t[:, :, start:end] for t in (query, key, value)), POWER)
            torch.testing.assert_close(packed[:, :, start:end], alone, rtol=1e-5, atol=1e-6)

    others = torch.ones(177, dtype=torch.bool)
    others[28:100] = False
    changed = [t.detach().clone() for t in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 28:100] += 100
    perturbed = block_pattern_attention(*changed, POWER, cu_seqlens=PACKED)
    assert torch.equal(perturbed[:, :, others], packed[:, :, others])
    grads = torch.autograd.grad(packed[:, :, 28:100].sum(), (query, key, value))
    assert all((grad[:, :, others] == 0).all() for grad in grads)


@pytest.mark.parametrize("step", [1, 3, 16, 50])
def test_steps_behind_a_cache_are_rows_of_the_whole(step: int, make_inputs) -> None:
    query, key, value = (t.detach() for t in make_inputs(4, 2, 150))
    whole, whole_lse = block_pattern_attention(query, key, value, POWER, return_lse=True)
    for start in range(0, 150, step):
        rows = slice(start, min(start + step, 150))
        cached = slice(0, rows.stop)
        out, lse = block_pattern_attention(
            query[:, :, rows], key[:, :, cached], value[:, :, cached], POWER, return_lse=True
        )
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, whole_lse[:, :, rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "q_start"), [(1, 149), (5, 142), (20, 100)])
def test_unlisted_blocks_and_later_keys_are_never_read(
    sparse, rows: int, q_start: int, make_inputs, outputs_and_gradients
) -> None:
    query, key, value = make_inputs(4, 2, rows, 160)
    clean = outputs_and_gradients(sparse(POWER), (query, key, value), q_start=q_start)
    listed = {j for t in range(q_start // 16, (q_start + rows - 1) // 16 + 1) for j in POWER.key_blocks(t)}
    position = torch.arange(160)
    poisoned = ~torch.isin(position // 16, torch.tensor(sorted(listed))) | (position >= q_start + rows)
    assert poisoned.sum() > 16
    with torch.no_grad():
        key[:, :, poisoned] = value[:, :, poisoned] = float("nan")
    dirty = outputs_and_gradients(sparse(POWER), (query, key, value), q_start=q_start)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (dirty[3][:, :, poisoned] == 0).all()


def test_the_gradient_of_a_stack_reaches_the_receptive_field() -> None:
    pattern = PowerPattern(2, 1, 0)
    blocks, layers = 16, 4
    for depth in range(1, layers + 1):
        hidden = torch.randn(1, 2, 2 * blocks, 4, dtype=torch.float64, requires_grad=True)
        state = hidden
        for _ in range(depth):
            state = state + block_pattern_attention(state, state, state, pattern)
        (grad,) = torch.autograd.grad(state[:, :, -2:].sum(), hidden)
        reached = grad.abs().sum((0, 1, 3)).view(blocks, 2).sum(1) > 0
        assert reached.tolist() == pattern.reach(blocks, depth)[-1].tolist()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif("not torch.cuda.is_available()")])],
)
def test_runs_repeat_bit_for_bit(sparse, device: str, make_inputs, outputs_and_gradients) -> None:
    tokens = 1024 if sparse.backend == "reference" else 130
    tensors = tuple(t.detach().to(device) for t in make_inputs(4, 2, tokens, batch=2, head_dim=32))
    first = outputs_and_gradients(sparse(PowerPattern(32, 3, 1)), tensors)
    again = outputs_and_gradients(sparse(PowerPattern(32, 3, 1)), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_autocast_changes_the_inputs_dtype_and_nothing_else(make_inputs) -> None:
    tensors = make_inputs(4, 2, 77)
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    expected = block_pattern_attention(*low, POWER)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_pattern_attention(tensors[0], low[1], tensors[2], POWER)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_memory_grows_with_the_listed_blocks(make_inputs, largest_tensor) -> None:
    pattern = PowerPattern(64, 3, 1)
    sparse = partial(block_pattern_attention, pattern=pattern, return_lse=True)

    def train(attention, tokens: int) -> int:
        tensors = make_inputs(2, 1, tokens, head_dim=8)
        return largest_tensor(lambda: attention(*tensors)[0].sum().backward())

    assert train(oracle(pattern), 512) >= 512 * 512
    short, long = train(sparse, 8192), train(sparse, 16384)
    assert long <= 16384 * 16384 / 50
    assert long <= 2.2 * short
