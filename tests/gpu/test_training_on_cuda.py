"""A model trained a few steps on a CUDA device: the kernels give the losses of the reference path."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels.block_pattern import op
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, TOKENS = 6, 3000


def losses(dtype: torch.dtype, head_dim: int) -> list[float]:
    """Of a few AdamW steps on packed random documents, from the same weights and data each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=4 * head_dim,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config).to("cuda", dtype).train()
    sparsetrain.sparsify(model, {"method": "power", "block": 128, "window": 2, "sinks": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(64, (1, TOKENS // 4), device="cuda").repeat(1, 4)
    positions = torch.cat([torch.arange(n, device="cuda") for n in (700, 1, 1299, 1000)])[None]
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_train_like_the_reference(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    real = op.choose_backend
    monkeypatch.setattr(op, "choose_backend", lambda *args: chosen.append(real(*args)) or chosen[-1])
    ours = losses(torch.bfloat16, head_dim)
    assert set(chosen) <= {"gluon", "triton"}
    monkeypatch.setattr(op, "choose_backend", lambda *args: "reference")
    yardstick, exact = losses(torch.bfloat16, head_dim), losses(torch.float32, head_dim)
    assert exact[-1] < exact[0]
    allowed = 2 * max(abs(a - b) for a, b in zip(yardstick, exact)) + 1e-3
    assert max(abs(a - b) for a, b in zip(ours, exact)) <= allowed
