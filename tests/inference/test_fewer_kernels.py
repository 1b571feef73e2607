"""What is said of a model that is made ready for steps. What it computes then is compared on a GPU."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsetrain
from sparsetrain.inference import fewer_kernels
from sparsetrain.modeling import fused_layers


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models whose projections were merged."""
    found: list[Any] = []
    monkeypatch.setattr(fewer_kernels, "merge_projections", found.append)
    return found


def test_a_model_on_a_cpu_stays_as_it_is(merged):
    assert fewer_kernels.ready_for_steps(sparsetrain.load("sparsetrain:tiny")) is None
    assert not merged


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (None, r"steps are faster with liger-kernel \(pip install 'sparsetrain\[liger\]'\)"),
        ("Liger 1 in the decoder layers: rope", "Liger 1 in the decoder layers: rope$"),
        (
            fused_layers.UnknownFamily("Liger 1 does not know models of type x"),
            "of type x: its layers stay as they are",
        ),
        (fused_layers.NotFused("with Liger 1 the output of Norm differs by 2"), "differs by 2: its layers stay"),
    ],
    ids=["not installed", "fused", "unknown", "different"],
)
def test_what_is_fused_is_said_and_nothing_fails(merged, monkeypatch, outcome, said):
    def fuse(model: Any, device: Any) -> str:
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(fused_layers, "is_installed", lambda: outcome is not None)
    monkeypatch.setattr(fused_layers, "fuse", fuse)
    model = SimpleNamespace(device=torch.device("cuda"))
    found = fewer_kernels.ready_for_steps(model)
    assert found is not None
    assert re.search(said, found)
    assert "train.liger" not in found
    assert merged == [model]
