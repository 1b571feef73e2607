"""A model that its user compiles generates the same from caches that grow, past every page they had room for."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.modeling import sparsify

GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
SPARSEK = {"method": "sparsek", "topk": 5, "window": 6, "sinks": 2, "score_buffer": 4096}


@pytest.mark.parametrize("attention", [POWER, SPARSEK], ids=lambda attention: attention["method"])
def test_a_compiled_model_generates_the_same(attention, tiny, tokens):
    model, ids = sparsify(tiny("llama", num_hidden_layers=1), attention), tokens(8)
    want = model.generate(ids, **GREEDY)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert model.generate(ids, **GREEDY).tolist() == want.tolist()
