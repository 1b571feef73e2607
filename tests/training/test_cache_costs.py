"""The bytes of a cache that a run records are those that generation keeps."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain.modeling import sparsify
from sparsetrain.recipe import load_recipe
from sparsetrain.training.output.costs import GENERATED, cache_costs

PROMPT = 512


@pytest.mark.parametrize(
    "attention",
    [
        "{method: full}",
        "{method: power, block: 16, window: 3, dense_layers: [0]}",
        "{method: sliding, block: 16, window: 3}",
        "{method: sparsek, topk: 24, window: 16, sinks: 2}",
        "{method: recycled, every: 16, generate_every: 16, keep: 8, recent: 4}",
    ],
)
def test_the_bytes_recorded_are_those_of_a_cache(attention):
    recipe = load_recipe("quickstart", [f"attention={attention}", f"sequence.length={PROMPT}"]).recipe
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=PROMPT + GENERATED,
    )
    model = sparsify(LlamaForCausalLM(config).eval(), recipe.attention)
    cache = sparsetrain.SparseCache(model, max_length=PROMPT + GENERATED)
    with torch.no_grad():
        model(torch.randint(64, (1, PROMPT)), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        kept = layer.memory.state.slots if hasattr(layer.memory, "state") else layer.memory
        held += kept.keys.nbytes + kept.values.nbytes
    dense = 2 * 2 * 2 * 8 * 4 * (PROMPT + GENERATED)
    assert cache_costs(model, recipe) == {
        "cache/tokens": PROMPT + GENERATED,
        "cache/bytes": held,
        "cache/bytes_full": dense,
    }
    assert (held < dense) == (recipe.attention.method not in ("full", "recycled"))
