"""Slots of SparseK's generation for tests: made, filled, and compared."""

from __future__ import annotations

import torch
from sparsetrain_kernels.sparsek_decode import EMPTY, SparseKSlots, sparsek_decode_update

SHAPE = {"topk": 6, "window": 5, "sinks": 3}


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def empty_slots(
    batch=1, heads=2, selections=2, entries=20, head_dim=8, dtype=torch.float32, fill=0.0, device="cpu", **shape
):
    """The memory of a layer that has read nothing; ``fill`` is what its empty keys and values hold."""
    shape = {**SHAPE, **shape}
    slots, each, wide = sum(shape.values()), (batch, selections), torch.promote_types(dtype, torch.float32)
    with torch.device(device):
        return SparseKSlots(
            keys=torch.full((batch, heads, slots, head_dim), fill, dtype=dtype),
            values=torch.full((batch, heads, slots, head_dim), fill, dtype=dtype),
            positions=torch.full((*each, slots), EMPTY),
            scores=torch.full((*each, slots), -torch.inf, dtype=wide),
            buffer=torch.full((*each, entries), -torch.inf, dtype=wide),
            threshold=torch.full(each, -torch.inf, dtype=wide),
            read=torch.zeros(each, dtype=torch.int64),
        )


def clone(slots):
    return SparseKSlots(*(tensor.clone() for tensor in slots))


def read(slots, scores, backend, seed=1, **shape):
    """Take in a token for each of ``scores [B, Hs, N]``, with keys and values that depend on the position alone."""
    shape, (batch, heads, _, head_dim) = {**SHAPE, **shape}, slots.keys.shape
    start, like = int(slots.read[0, 0]), {"dtype": slots.keys.dtype, "device": slots.keys.device}
    for n in range(scores.shape[2]):
        key, value = normal(2, batch, heads, 1, head_dim, seed=seed + start + n, **like)
        sparsek_decode_update(key, value, scores[:, :, n : n + 1], slots, **shape, backend=backend)
    return slots


def ragged(lengths, scores=None, **options):
    """Slots of texts of different lengths, read by plain PyTorch."""
    shape = {name: options[name] for name in SHAPE if name in options}
    parts = []
    for row, length in enumerate(lengths):
        one = empty_slots(**options)
        own = normal(1, one.read.shape[1], length, seed=50 + row) if scores is None else scores[row, None, :, :length]
        parts.append(read(one, own.to(one.scores), "reference", seed=1000 * row, **shape))
    return SparseKSlots(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def assert_same_slots(got, want):
    """Equal in every bit, whatever the buffer's order; gates as far as the last bit of a threshold goes. Thresholds
    themselves may differ where several give the same gates."""
    for name in ("keys", "values", "positions", "scores", "read"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.buffer.sort(2).values, want.buffer.sort(2).values)
    assert torch.equal(got.threshold > -torch.inf, want.threshold > -torch.inf)
    last_bit = 1.2e-7 * want.threshold.nan_to_num(neginf=0.0).abs()[..., None] + 1e-12
    assert bool(((gates(got) - gates(want)).abs() <= last_bit).all())


def gates(slots):
    """Of the scores in the buffer, from the smallest on."""
    buffer = slots.buffer.sort(2).values.double()
    return (buffer - slots.threshold[..., None]).where(buffer > -torch.inf, 0.0).clamp(0.0, 1.0)


def in_double(slots):
    """The same in fp64, with zeros for NaN in the empty slots, which plain PyTorch multiplies by 0."""
    slots = SparseKSlots(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in slots))
    return slots._replace(keys=slots.keys.nan_to_num(0.0), values=slots.values.nan_to_num(0.0))
