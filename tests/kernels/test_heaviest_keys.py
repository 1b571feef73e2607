"""Which keys are the heaviest, to the last tie: rows whose weights are numbers of our own, against sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparsetrain_kernels import top_k_keys
from sparsetrain_kernels.backend import INTERPRETING
from torch import Tensor

TOKENS = 700
POSITIONS = (2, 16, 130, 699)
PLACE = torch.arange(TOKENS)
GENERATOR = torch.Generator().manual_seed(0)
RANDOM = torch.randn(TOKENS, generator=GENERATOR)
WEIGHTS: dict[str, Tensor] = {
    "random": RANDOM,
    "all equal": torch.full((TOKENS,), -3.0),
    "constant stretches": RANDOM[PLACE // 45],
    "few numbers": (RANDOM * 2).round(),
    "zeros of both signs": torch.where(RANDOM < 0.5, -0.0, RANDOM.clamp(min=0) * 0),
    "falling": -PLACE / 10.0,
    "rising": PLACE / 10.0,
    "below what fp16 holds": RANDOM * 1e5 - 1e5,
    "beyond what fp16 holds": torch.where(PLACE % 50 == 9, 1e30, RANDOM),
    "one peak": torch.where(PLACE == 77, 5.0, -5.0),
    "one cluster": torch.where((PLACE - 300).abs() < 30, 8.0, 0.0) + RANDOM,
    "neighbouring peaks": torch.where((PLACE % 32 == 15) | (PLACE % 32 == 16), 10.0 + PLACE // 32, 0.0),
    "a peak in every span": torch.where(PLACE % 16 == PLACE // 16 % 16, 10.0, 0.0) + RANDOM / 4,
}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def expected(weights: Tensor, position: int, k: int, width: int, sinks: int, window: int) -> tuple[list[int], int]:
    """The list of a row, and how many keys are equal to the last one and older."""
    rounded = weights[: position + 1].double().clamp(min=-65504.0).half().double()
    half = width // 2
    pooled = [rounded[max(place - half, 0) : place + half + 1].max().item() for place in range(position + 1)]
    candidates = list(range(sinks, max(position + 1 - window, sinks)))
    best = sorted(candidates, key=lambda place: (pooled[place], place), reverse=True)
    listed = best[:k]
    dropped = [place for place in best[k:] if pooled[place] == pooled[listed[-1]]]
    return sorted(listed), len(dropped)


@pytest.fixture
def small_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poison_launches: Any) -> None:
    """Kernels take many steps for a row, and find NaN in fresh memory."""
    if request.getfixturevalue("backend") == "triton":
        if not INTERPRETING:
            pytest.skip("runs in Triton's interpreter, on machines without a GPU")
        from sparsetrain_kernels.key_choice.triton import launch

        poison_launches(launch)
        monkeypatch.setattr(launch, "TILE", 64)


@pytest.mark.usefixtures("small_steps")
@BACKENDS
@pytest.mark.parametrize(
    ("k", "width", "sinks", "window"),
    [(20, 7, 0, 0), (20, 1, 3, 10), (90, 3, 16, 33), (1, 7, 0, 1), (20, 35, 2, 5), (600, 7, 20, 20)],
)
def test_lists_are_those_of_sorting(k: int, width: int, sinks: int, window: int, backend: str) -> None:
    names = list(WEIGHTS)
    # A KV head for each kind of row: with a query of one 1, logarithms of weights are what keys hold there.
    key = torch.zeros(1, len(names), TOKENS, 16)
    key[0, :, :, 0] = torch.stack(list(WEIGHTS.values()))
    query = torch.zeros(1, len(names), len(POSITIONS), 16)
    query[..., 0] = 1.0
    positions = torch.tensor(POSITIONS, dtype=torch.int32)
    found = top_k_keys(
        query,
        key,
        torch.zeros(query.shape[:3]),
        k,
        query_positions=positions,
        width=width,
        sinks=sinks,
        window=window,
        scale=1.0,
        backend=backend,
    )
    for head, name in enumerate(names):
        for row, position in enumerate(POSITIONS):
            listed, dropped = expected(WEIGHTS[name], position, k, width, sinks, window)
            count = int(found.counts[0, head, row])
            assert (found.lists[0, head, row, :count].tolist(), name, position) == (listed, name, position)
            assert int(found.dropped[0, head, row]) == dropped, (name, position)
