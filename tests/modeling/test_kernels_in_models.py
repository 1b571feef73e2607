"""Whole models by kernels, in Triton's interpreter, give what plain PyTorch gives: in training and in generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from sparsetrain_kernels import backend
from torch import Tensor
from transformers import PreTrainedModel

from sparsetrain.modeling import sparsify

if not (backend.TRITON_INSTALLED and backend.INTERPRETING):
    pytest.skip("runs in Triton's interpreter, on machines without a GPU", allow_module_level=True)

SPARSEK = {"method": "sparsek", "topk": 5, "window": 4, "sinks": 1, "slope": 1e-3, "score_buffer": 32}
METHODS = {
    "full": {"method": "full"},
    "power": {"method": "power", "block": 4, "window": 2, "sinks": 1},
    "longnet": {"method": "longnet", "block": 4, "head_shift": True},
    "sparsek": SPARSEK,
    "sparsek, not normalised": {**SPARSEK, "normalize": False},
}
LENGTH = 14
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def make(method: str, tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """One layer, two KV heads."""
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    return sparsify(tiny("llama", **small, head_dim=4, intermediate_size=8), METHODS[method])


@pytest.fixture(autouse=True)
def _small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search over a few tokens; the interpreter takes milliseconds for each program of it."""
    from sparsetrain_kernels.causal_selection.triton import crossing

    monkeypatch.setattr(crossing, "CHUNK", 64)
    monkeypatch.setattr(crossing, "STEP", 8)


def both(act: Callable[[], list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The results of kernels and of plain PyTorch, side by side."""
    plain = act()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "KERNELS_ON_CPU", True)
        return zip(act(), plain, strict=True)


@pytest.mark.parametrize(
    ("method", "documents"),
    [*((method, (5, LENGTH - 5)) for method in METHODS), ("power", (LENGTH,)), ("sparsek", (LENGTH,))],
    ids=str,
)
def test_training_gives_the_loss_and_the_gradients_of_the_plain_path(method, documents, tiny, tokens) -> None:
    model = make(method, tiny)
    ids, places = tokens(LENGTH), torch.cat([torch.arange(length) for length in documents])[None]

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False, position_ids=places).loss
        loss.backward()
        return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]

    model.train()
    for by_kernels, plain in both(step):
        torch.testing.assert_close(by_kernels, plain, **CLOSE)


@pytest.mark.parametrize(
    ("method", "rows"), [*((method, 2) for method in METHODS), ("power", 1), ("sparsek", 1)], ids=str
)
def test_generation_reads_what_the_plain_path_reads(method, rows, tiny, tokens) -> None:
    """A prompt in two chunks, then a token: one text, and two of which one is padded on the left."""
    model = make(method, tiny)
    ids = torch.cat([tokens(LENGTH, seed) for seed in range(rows)])
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0

    def read() -> list[Tensor]:
        cache, results = None, []
        for start, stop in pairwise((0, 8, LENGTH - 1, LENGTH)):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            results.append(out.logits[:, -1])
        return results

    with torch.no_grad():
        for by_kernels, plain in both(read):
            torch.testing.assert_close(by_kernels, plain, **CLOSE)
