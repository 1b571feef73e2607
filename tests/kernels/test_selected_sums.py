"""The partial sums of selected keys: one for each stretch of rows that reads a key, added up in its first place."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels.backend import INTERPRETING, TRITON_INSTALLED
from sparsetrain_kernels.selected_keys.inputs import SelectedInputs

pytestmark = pytest.mark.skipif(not (TRITON_INSTALLED and INTERPRETING), reason="runs in Triton's interpreter")


def test_sums_of_a_key_are_those_of_its_stretches() -> None:
    from sparsetrain_kernels.selected_keys.triton.launch import sum_partials
    from sparsetrain_kernels.selected_keys.triton.lists import STRETCH

    tokens, window, heads = 5 * STRETCH + 7, 5, 2
    generator = torch.Generator().manual_seed(0)
    exit = torch.zeros(1, heads, tokens, dtype=torch.int32)
    some = torch.randint(0, tokens - window, (40,), generator=generator).sort().values
    # To the end, for a few rows, and for some stretches; and the first token, which is selected to the end.
    lengths = torch.randint(0, 4 * STRETCH, (heads, 40), generator=generator).int()
    exit[0, :, some] = (some + window + lengths).clamp(max=tokens).int()
    exit[0, :, 0] = tokens
    enter = torch.arange(tokens) + window
    counts = torch.where(exit > enter, (exit - 1) // STRETCH - enter // STRETCH + 1, 0)
    until = counts.cumsum(2, dtype=torch.int32)
    places = int(until[..., -1].max())
    partial = torch.randn(1, 1, places, 2, 64, generator=generator)
    scores = torch.randn(1, 1, places, generator=generator)
    before = partial.clone(), scores.clone()
    empty = torch.empty(0)
    inputs = SelectedInputs(*(empty,) * 5, exit, None, 1.0, 1, window, 0, "value")
    # Of the second head alone.
    sum_partials(inputs._replace(scores=torch.empty(1, heads, 0)), (partial, scores), until, 1)
    for key in counts[0, 1].nonzero().flatten().tolist():
        end, count = int(until[0, 1, key]), int(counts[0, 1, key])
        for ours, parts in zip((partial, scores), before, strict=True):
            expected = parts[0, 0, end - count : end].double().sum(0)
            torch.testing.assert_close(ours[0, 0, end - count].double(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours[0, 0, end - count + 1 : end], parts[0, 0, end - count + 1 : end])
