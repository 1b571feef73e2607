"""Every decoder family of transformers attends as its own eager code does, alone and packed, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_families import small_model

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify

LENGTHS = [17, 1, 15, 7]
EQUAL = """
afmoe apertus arcee aria_text beam biogpt bitnet cohere cohere2 cohere2_moe cwm dbrx diffllama dots1 emu3 ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm glm4
glm4_moe gpt_neox gpt_oss gpt2 granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash
minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt phi phi3
phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
"""
"""Both equal eager attention. Their windows travel in the call of attention, in the mask, or in both."""

UNTOLD = ["fuyu", "gpt_bigcode", "moshi", "persimmon"]
"""Their attention is not told the positions, so documents have to be given by cu_seqlens."""

ALONE = ["falcon_h1", "lfm2_moe", "lfm3", "olmo_hybrid", "qwen3_5_text", "qwen3_next"]
"""They mix tokens outside attention, so documents cannot be packed."""

REFUSED = {
    "deepseek_v4": "sliding window",
    "doge": r"shape \[1, 4, 40, 40\]",
    "gemma4_unified": "a mask of its own",
    "minimax": "sliding window of None tokens, but MiniMaxAttention asks for 7",
}
"""Refused at the first call; those refused by sparsify are in test_refusals.py."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they gain on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def row() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, {"position_ids": positions, "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int()}


def eager_and_full(model_type: str) -> tuple[Any, Any]:
    model = small_model(model_type)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager, sparsify(model, {"method": "full"})


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("model_type", [*EQUAL.split(), *UNTOLD])
def test_a_family_equals_its_eager_attention_alone_and_packed(model_type):
    eager, model = eager_and_full(model_type)
    ids, documents = row()
    one = {"cu_seqlens": torch.tensor([0, ids.shape[1]]).int()} if model_type in UNTOLD else {}
    close(logits(model, ids, **one), logits(eager, ids))
    separate = torch.cat([logits(eager, document) for document in ids.split(LENGTHS, 1)], 1)
    close(logits(model, ids, **documents), separate)
    if model_type not in UNTOLD:
        close(logits(model, ids, position_ids=documents["position_ids"]), separate)


@pytest.mark.parametrize("model_type", ALONE)
def test_a_family_that_mixes_tokens_elsewhere_equals_it_alone_and_refuses_packing(model_type):
    eager, model = eager_and_full(model_type)
    ids, documents = row()
    close(logits(model, ids), logits(eager, ids))
    for given in (documents, {"position_ids": documents["position_ids"]}):
        with pytest.raises(ModelError, match=r"mixes tokens outside attention.*sequence\.packing: false"):
            logits(model, ids, **given)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_asks_for_another_mask_is_refused(model_type):
    model = sparsify(small_model(model_type), {"method": "full"})
    with pytest.raises(ModelError, match=REFUSED[model_type]):
        logits(model, row()[0])


@pytest.mark.parametrize("model_type", ["bart", "blenderbot-small", "pegasus"])
def test_a_family_that_counts_positions_by_itself_refuses_packing(model_type):
    model = sparsify(small_model(model_type, decoder_layers=1, encoder_layers=1), {"method": "full"})
    ids, documents = row()
    with pytest.raises(ModelError, match=r"counts positions by itself.*sequence\.packing: false"):
        logits(model, ids, **documents)
