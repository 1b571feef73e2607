"""Hopper kernels with a fault, one contribution left out, fail against their oracles; one with a check never exceeds
its bound."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_oracle import assert_matches_oracle, make_inputs, outputs_and_gradients
from changed_kernels import changed
from sparsetrain_kernels import (
    block_pattern_attention,
    block_pattern_attention_dense,
    causal_sparsek,
    selected_attention,
    selected_attention_dense,
)

from sparsetrain.patterns import PowerPattern

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper device")]

POWER = PowerPattern(128, 2, 1)
HERE = "(step == 3) & (gl.program_id(0) == 0)"
SUM = "            tma_add(dq_desc, [batch, head, row + part * BLOCK_M, w * COLUMNS], dq_bufs.index(w))"
INTEGER = "_to_integer(dq * gl.expand_dims(scale, 1))"
PARTS = "dk += gl.load(partial_ptr + cells, mask=gl.expand_dims(is_listed{}, 1), other=0.0)"
inputs = partial(make_inputs, device="cuda", dtype=torch.bfloat16, head_dim=128)
fused = partial(block_pattern_attention, pattern=POWER, return_lse=True, backend="gluon")
oracle = partial(block_pattern_attention_dense, pattern=POWER)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts a changed kernel in the place of the one that is launched."""

    def put(place: str, launches: str, kernel: str, old: str, new: str) -> None:
        modules = [importlib.import_module(f"sparsetrain_kernels.{name}") for name in (place, launches)]
        monkeypatch.setattr(modules[1], kernel, getattr(changed(modules[0], old, new, tmp_path), kernel))

    return put


@pytest.fixture
def build_fused(build, monkeypatch: pytest.MonkeyPatch):
    """The same for the fused backward kernel, which is then launched at any size."""
    from sparsetrain_kernels.block_pattern.hopper import fused_launch

    monkeypatch.setattr(fused_launch, "LEAST_ROWS", 0)
    return partial(
        build,
        "block_pattern.hopper.fused_backward",
        "block_pattern.hopper.fused_launch",
        "block_pattern_bwd_fused_kernel",
    )


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        (SUM, f"            if ({HERE}) == 0:\n    {SUM}", "grad query"),
        ("(p.to(dtype), LEFT)", f"(gl.where({HERE}, 0.0, p).to(dtype), LEFT)", "grad value"),
        ("gl.convert_layout(ds, LEFT)", f"gl.convert_layout(gl.where({HERE}, 0.0, ds).to(dtype), LEFT)", "grad key"),
    ],
    ids=["query", "value", "key"],
)
def test_a_part_that_the_fused_kernel_leaves_out_is_noticed(build_fused, old: str, new: str, wrong: str) -> None:
    tensors = inputs(8, 4, 2177)
    assert_matches_oracle(fused, oracle, tensors)
    build_fused(old, new)
    with pytest.raises(AssertionError, match=wrong):
        assert_matches_oracle(fused, oracle, tensors)


@pytest.mark.parametrize(
    ("kernel", "old", "new", "wrong"),
    [
        ("fwd", "gated = weights\n", "gated = gl.where(step == 2, 0.0, weights)\n", "out"),
        ("dq", "gl.convert_layout(ds.to(dtype)", "gl.convert_layout(gl.where(step == 2, 0.0, ds).to(dtype)", "query"),
        ("dkv", PARTS.format(""), PARTS.format(" & (key_tile != 1)"), "key"),
    ],
    ids=["forward", "query", "key"],
)
def test_a_part_that_a_kernel_of_sparsek_leaves_out_is_noticed(build, kernel: str, old: str, new: str, wrong) -> None:
    query, key, value = inputs(4, 2, 1500)
    scores = torch.randn(1, 2, 1500, generator=torch.Generator().manual_seed(3)).cuda() * 0.5
    selection = causal_sparsek(scores, 200, 130, sinks=4)
    chosen = {"scores": scores, "threshold": selection.threshold, "exit": selection.exit}
    options = {"topk": 200, "window": 130, "sinks": 4, "gate": "straight"}

    def attend(operation, *tensors):
        # The oracle in fp64 wants such scores. In place of the log-sum-exp, which has no gradient, something that has.
        wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        own = {name: each if name == "exit" else each.to(wide) for name, each in chosen.items()}
        out = operation(*tensors, **own, **options)
        out = out[0] if isinstance(out, tuple) else out
        return out, out.to(wide).mean(-1)

    ours = partial(attend, partial(selected_attention, backend="gluon"))
    dense = partial(attend, selected_attention_dense)
    assert_matches_oracle(ours, dense, (query, key, value))
    modules = {"fwd": "forward", "dq": "grad_query", "dkv": "grad_key_value"}
    name = f"selected_{'' if kernel == 'fwd' else 'bwd_'}{kernel}_hopper_kernel"
    build(f"selected_keys.hopper.{modules[kernel]}", "selected_keys.hopper.launch", name, old, new)
    with pytest.raises(AssertionError, match=wrong):
        assert_matches_oracle(ours, dense, (query, key, value))


WILD = torch.tensor([30.0] + [1.0] * 127)


@pytest.mark.parametrize(
    "change", [{}, {0: 12.0}, {0: WILD, 1: WILD}, {1: 1e3, 2: 1e-3}], ids=["plain", "saturated", "wild", "sizes"]
)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=["grouped", "own keys"])
def test_integers_stay_below_their_bound_in_any_order(build_fused, monkeypatch, heads, change) -> None:
    """The sum of magnitudes, which this build leaves, is at least what the integers come to at any time."""
    from sparsetrain_kernels.block_pattern.triton.query_sum import QuerySum

    peaks: list[tuple[int, int]] = []
    finish = QuerySum.finish

    def noted(self: QuerySum, *args: object) -> None:
        peaks.append((int(self.integers.min()), int(self.integers.max())))
        finish(self, *args)

    monkeypatch.setattr(QuerySum, "finish", noted)
    build_fused(INTEGER, "_to_integer(gl.abs(dq * gl.expand_dims(scale, 1)))")
    tensors = inputs(*heads, 9000)
    with torch.no_grad():
        for place, factor in change.items():
            tensors[place].mul_(factor.cuda() if isinstance(factor, torch.Tensor) else factor)
    for cu_seqlens in (None, torch.tensor([0, 300, 5000, 9000], dtype=torch.int32, device="cuda")):
        outputs_and_gradients(fused, tensors, cu_seqlens=cu_seqlens)
    assert len(peaks) == 2
    for least, most in peaks:
        assert least >= 0
        assert 2**16 < most < 2**30
