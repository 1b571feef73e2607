"""Rotary frequencies that depend on a length: each document gets those it has alone in plain transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from small_families import small_model

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify

LENGTHS = [30, 7, 40, 20, 16, 17]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "max_position_embeddings": 16,
    },
}


@pytest.fixture(params=CASES)
def models(request):
    """A model as transformers makes it, and one with full attention in it."""
    model = small_model(request.param, **CASES[request.param])
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain, sparsify(model, {"method": "full"})


@pytest.fixture
def documents():
    """Documents on both sides of the length at which the frequencies change."""
    ids = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return ids.split(LENGTHS, 1)


@torch.no_grad()
def test_a_packed_document_equals_itself_alone_whatever_was_seen_before(models, documents):
    plain, model = models
    # Of a copy each: the dynamic kind remembers the longest document in plain transformers.
    alone = torch.cat([copy.deepcopy(plain)(document, use_cache=False).logits for document in documents], 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for _ in range(2):
        packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_of_a_padded_batch_equals_that_of_each_row_alone(models, documents):
    plain, model = models
    short, long = documents[1], documents[0]
    alone = [copy.deepcopy(plain).generate(row, max_new_tokens=8, do_sample=False) for row in (short, long)]
    padding = long.shape[1] - short.shape[1]
    batch = torch.cat([torch.nn.functional.pad(short, (padding, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    found = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[0, padding:], alone[0][0])
    assert torch.equal(found[1], alone[1][0])


def test_a_padded_row_that_generates_across_the_length_is_refused(documents):
    model = sparsify(small_model("phi3", **CASES["phi3"]), {"method": "full"})
    batch = torch.cat([torch.nn.functional.pad(documents[1], (23, 0)), documents[0]])
    mask = torch.ones_like(batch)
    mask[0, :23] = 0
    with pytest.raises(ModelError, match=r"beyond 16 tokens.*one at a time"):
        model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False)
