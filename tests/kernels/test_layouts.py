"""How tensors lie in memory changes nothing: every operation, forward and backward, by kernels bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from decode_slots import empty_slots
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from sparsetrain_kernels.block_decode import block_pattern_decode
from sparsetrain_kernels.block_pattern import block_pattern_attention
from sparsetrain_kernels.causal_selection import CausalSelection, causal_sparsek, topk_statistics
from sparsetrain_kernels.dense import causal_attention
from sparsetrain_kernels.score_placement import document_positions, place_scores
from sparsetrain_kernels.selected_keys import selected_attention
from sparsetrain_kernels.sparsek_decode import sparsek_decode_attention, sparsek_decode_update
from sparsetrain_kernels.sparsek_projection import sparsek
from torch import Tensor

from sparsetrain.patterns import PowerPattern

TOKENS = 17
POWER = PowerPattern(4, 2, 1)
SELECT = {"topk": 5, "window": 4, "sinks": 2}
DECODE = {"topk": 3, "window": 2, "sinks": 1}
Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Those with a gradient, and those without."""


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers, and between them NaN or a large integer."""
    gap = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 2**30)
    return torch.stack([tensor, gap], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "second dimension last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t,
    "last dimension first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "gaps between numbers": with_gaps,
    "gaps between rows": lambda t: torch.cat([t, torch.full_like(t, 7)], -1)[..., : t.shape[-1]],
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attended(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, 4, TOKENS, 8), normal(batch, 2, TOKENS, 8, seed=1), normal(batch, 2, TOKENS, 8, seed=2)


def scored(batch: int) -> Tensor:
    return normal(batch, 2, TOKENS, seed=3)


def selected(batch: int) -> CausalSelection:
    return causal_sparsek(scored(batch), **SELECT, backend="reference")


def block_pattern(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *bounds: Tensor, backend: str) -> Outputs:
    cu_seqlens = bounds[0] if bounds else None
    options = {"sink_logits": sinks, "cu_seqlens": cu_seqlens, "return_lse": True, "backend": backend}
    return block_pattern_attention(q, k, v, POWER, **options), ()


def dense(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Outputs:
    return causal_attention(q, k, v, return_lse=True), ()


def decode(q: Tensor, lengths: Tensor, sinks: Tensor, *, backend: str) -> Outputs:
    _, key, value = attended(len(q))
    options = {"sink_logits": sinks, "return_lse": True, "backend": backend}
    return (), block_pattern_decode(q, key, value, POWER, lengths=lengths, **options)


def projection(z: Tensor, k: Tensor, *, backend: str) -> Outputs:
    return (sparsek(z, k, backend=backend),), ()


def selection(scores: Tensor, *bounds: Tensor, backend: str) -> Outputs:
    found = causal_sparsek(scores, **SELECT, cu_seqlens=bounds[0] if bounds else None, backend=backend)
    return found[:1], found[1:]


def placement(linear: Tensor, gain: Tensor, *, backend: str) -> Outputs:
    scores, moments = place_scores(linear, gain, document_positions(TOKENS, None, linear.device), 1e-3, backend=backend)
    return (scores,), moments


def statistics(scores: Tensor, *fields: Tensor, backend: str) -> Outputs:
    return (), tuple(topk_statistics(scores, CausalSelection(*fields), **SELECT, backend=backend).values())


def over_a_selection(*tensors: Tensor, backend: str) -> Outputs:
    out, lse = selected_attention(*tensors, **SELECT, return_lse=True, backend=backend)
    return (out,), (lse,)


def decoding_steps(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, *, backend: str) -> Outputs:
    slots = empty_slots(batch=len(q), heads=2, selections=2, head_dim=8, **DECODE)
    outs = []
    for token in (slice(i, i + 1) for i in range(7)):
        new = (k[:, :, token], v[:, :, token], scores[:, :, token])
        sparsek_decode_update(*new, slots, **DECODE, backend=backend)
        outs.append(sparsek_decode_attention(q[:, :, token], slots, **DECODE, backend=backend))
    return (), (*outs, *slots)


# What is called, and with what, for a batch of this size; packed documents are a batch of one.
OPERATIONS: dict[str, tuple[Callable[..., Outputs], Callable[[int], tuple[Tensor, ...]]]] = {
    "block pattern": (block_pattern, lambda batch: (*attended(batch), normal(4))),
    "block pattern, packed": (block_pattern, lambda _: (*attended(1), normal(4), integers(0, 7, TOKENS))),
    "dense": (dense, attended),
    "decode": (decode, lambda batch: (attended(batch)[0][:, :, -1:], integers(15, 6)[:batch], normal(4))),
    "sparsek": (projection, lambda batch: (scored(batch), torch.linspace(1.5, 4, batch * 2).view(batch, 2))),
    "selection": (selection, lambda batch: (scored(batch),)),
    "selection, packed": (selection, lambda _: (scored(1), integers(0, 7, TOKENS))),
    "placement": (placement, lambda batch: (scored(batch), normal(batch, 2, TOKENS))),
    "statistics": (statistics, lambda batch: (scored(batch), *selected(batch))),
    "over a selection": (over_a_selection, lambda batch: (*attended(batch), scored(batch), *selected(batch)[:2])),
    "decoding steps": (decoding_steps, lambda batch: (*attended(batch), scored(batch))),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_plain_pytorch_does_not_see_the_layout(operation: str, batch: int) -> None:
    check(operation, batch, "reference", LAYOUTS)


@pytest.mark.skipif(not (TRITON_INSTALLED and INTERPRETING), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "dense"])
def test_kernels_do_not_see_the_layout(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain_kernels.causal_selection.triton import crossing

    # The interpreter takes milliseconds for each program of a search.
    monkeypatch.setattr(crossing, "CHUNK", 64)
    monkeypatch.setattr(crossing, "STEP", 8)
    # A batch of one: views of larger ones are copies already.
    check(operation, 1, "triton", ["second dimension last", "gaps between numbers"])


def check(operation: str, batch: int, backend: str, layouts: Iterable[str]) -> None:
    call, arguments = OPERATIONS[operation]
    numbers = arguments(batch)
    want = outputs_and_gradients(call, numbers, Tensor.contiguous, backend)
    # Kernels give the same bits; sums of plain PyTorch may run in another order.
    tolerance = 0.0 if backend == "triton" else 1e-5
    for name in layouts:
        lay_out = LAYOUTS[name]
        got = outputs_and_gradients(call, [lay_out(tensor) for tensor in numbers], lay_out, backend)
        for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{name}: output {index} differs"
            )


def outputs_and_gradients(
    call: Callable[..., Outputs], tensors: Sequence[Tensor], lay_out: Callable[[Tensor], Tensor], backend: str
) -> list[Tensor]:
    """All that comes out, the gradients of outputs laid out too."""
    leaves = [tensor.detach() for tensor in tensors]
    if call not in (decode, decoding_steps):
        leaves = [leaf.requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
    trained, others = call(*leaves, backend=backend)
    if not trained:
        return [*others]
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    cotangents = [lay_out(normal(*out.shape, seed=7)) for out in trained]
    return [*trained, *others, *torch.autograd.grad(trained, floats, cotangents)]
