"""Models and requests a method cannot serve are refused with the reason, never served in part."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_chunked_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral import modeling_mistral

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparse_layers, sparsify

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LATENT = {
    **SMALL,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 2,
}
T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BERT = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
MAMBA = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
LLAMA4 = {**SMALL, "intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 16, "attention_chunk_size": 8}
CASES = [
    (AutoModel, "bert", BERT, "both directions"),
    (AutoModelForSeq2SeqLM, "t5", T5, "encoder-decoder"),
    (AutoModelForCausalLM, "deepseek_v2", LATENT, "latent attention.*kv_lora_rank=8"),
    (AutoModelForCausalLM, "deepseek_v3", LATENT, "latent attention.*kv_lora_rank=8"),
    (AutoModelForCausalLM, "bloom", {"vocab_size": 96, "hidden_size": 16, "n_layer": 1, "n_head": 2}, "registry"),
    (AutoModelForCausalLM, "mamba", MAMBA, "registry"),
    (AutoModelForCausalLM, "llama4_text", LLAMA4, "chunked attention"),
]


@pytest.mark.parametrize(("auto", "model_type", "config", "reason"), CASES, ids=[case[1] for case in CASES])
def test_a_model_without_replaceable_attention_is_refused(auto, model_type, config, reason):
    model = auto.from_config(AutoConfig.for_model(model_type, **config))
    with pytest.raises(ModelError, match=reason):
        sparsify(model, POWER)
    assert sparse_layers(model) == []
    assert not hasattr(model.config, "sparsetrain")


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        sparsify(nn.Linear(2, 2), POWER)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_dense_layer_that_does_not_exist_is_refused(layer, tiny):
    with pytest.raises(ModelError, match=rf"layer {layer}, but the model has 2 layers"):
        sparsify(tiny("llama"), {**POWER, "dense_layers": [0, layer]})


@pytest.mark.parametrize("method", ["power", "sliding"])
def test_a_model_with_sliding_windows_in_every_layer_is_refused_unless_they_are_replaced(method, tiny):
    model = tiny("mistral", sliding_window=7)
    with pytest.raises(ModelError, match=r"no layer .* 2 use a sliding window.*replace_sliding_layers: true"):
        sparsify(model, {"method": method})
    sparsify(model, {"method": method, "replace_sliding_layers": True})


def test_full_attention_leaves_a_model_with_sliding_windows_as_it_is(tiny, eager, tokens):
    model = tiny("mistral", sliding_window=7)
    expected = eager(model)(tokens(45)).logits
    torch.testing.assert_close(sparsify(model, {"method": "full"})(tokens(45)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_all_layers_dense_is_refused(tiny):
    with pytest.raises(ModelError, match=r"no layer .* 2 are in attention\.dense_layers"):
        sparsify(tiny("llama"), {**POWER, "dense_layers": [0, 1]})


def test_state_space_layers_keep_their_mixer_and_refuse_packing(tokens):
    config = AutoConfig.for_model(
        "qwen3_next",
        **{**SMALL, "head_dim": 16, "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1},
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    torch.manual_seed(0)
    model = sparsify(AutoModelForCausalLM.from_config(config).eval(), POWER)
    assert [index for index, _, _ in sparse_layers(model)] == [3]
    model(tokens(20), use_cache=False)
    with pytest.raises(ModelError, match=r"sequence\.packing: false"):
        model(tokens(20), position_ids=torch.arange(10).repeat(2)[None], use_cache=False)
    with pytest.raises(ModelError, match="names layer 1, which has no attention"):
        sparsify(model, {**POWER, "dense_layers": [1]})


def test_attention_that_biases_its_logits_is_refused(tiny):
    class BiasedAttention(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            return interface(self, hidden_states, hidden_states, hidden_states, position_bias=self.bias, **kwargs)

    model = tiny("llama")
    model.model.layers[1].self_attn.__class__ = BiasedAttention
    with pytest.raises(ModelError, match=r"adds a bias by position to the logits \(position_bias\)"):
        sparsify(model, POWER)


def test_a_window_in_the_call_that_the_mask_does_not_have_is_refused(tiny, tokens, monkeypatch):
    model = sparsify(tiny("mistral", sliding_window=7), {"method": "full"})
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", create_causal_mask)
    with pytest.raises(ModelError, match="asks for a sliding window of 7 tokens in layer 0, and its mask for None"):
        model(tokens(20))


@pytest.mark.parametrize(
    ("request_of_mask", "reason"),
    [
        ({"or_mask_function": lambda b, h, q, k: k < 3}, "bidirectional image or prefix tokens"),
        ({"and_mask_function": lambda b, h, q, k: k % 2 == 0}, r"a mask of its own \(.*lambda"),
        ({"block_sequence_ids": torch.zeros(1, 20, dtype=torch.long)}, "a mask of its own beside the causal one"),
    ],
    ids=["or", "and", "blocks"],
)
def test_a_request_that_only_the_mask_carries_is_refused(request_of_mask, reason, tiny, tokens, monkeypatch):
    model = sparsify(tiny("llama"), POWER)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", partial(create_causal_mask, **request_of_mask))
    with pytest.raises(ModelError, match=reason):
        model(tokens(20))


@pytest.mark.parametrize("make", [create_chunked_causal_mask, create_bidirectional_mask])
def test_masks_of_chunks_and_of_both_directions_are_refused(make, tiny, tokens, monkeypatch):
    model = sparsify(tiny("llama"), POWER)
    model.config.attention_chunk_size = 8

    def wanted(**arguments):
        return make(**{name: arguments[name] for name in inspect.signature(make).parameters if name in arguments})

    monkeypatch.setattr(modeling_llama, "create_causal_mask", wanted)
    with pytest.raises(ModelError, match=r"within chunks|in both directions"):
        model(tokens(20))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([[1] * 5 + [0] * 3 + [1] * 12]), r"zeros between real tokens \(row 0, at token 5\)"),
        (torch.zeros(1, 1, 20, 20), r"shape \[1, 1, 20, 20\] \(4 dimensions"),
        (torch.ones(1, 20, 20, dtype=torch.bool), "dimensions"),
    ],
    ids=["holey", "4-D", "3-D"],
)
def test_masks_that_are_no_padding_are_called_what_they_are(mask, reason, training, tiny, tokens):
    model = sparsify(tiny("llama"), POWER).train(training)
    with pytest.raises(ModelError, match=reason):
        model(tokens(20), attention_mask=mask, use_cache=False)


def test_a_model_that_hides_positions_from_its_attention_needs_cu_seqlens(tokens):
    config = AutoConfig.for_model("persimmon", **SMALL)
    model = sparsify(AutoModelForCausalLM.from_config(config), POWER)
    with pytest.raises(ModelError, match=r"no position_ids.*pass it cu_seqlens"):
        model(tokens(20), use_cache=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_attentions": True}, "attention weights are never formed"),
        ({"position_bias": torch.zeros(1)}, "passes position_bias"),
        ({"is_causal": False}, "only causal attention"),
        ({"attention_mask": torch.zeros(1, 1, 20, 20)}, "4 dimensions"),
        ({"position_ids": torch.arange(20).repeat(2, 1), "cu_seqlens": torch.tensor([0, 20]).int()}, "one packed row"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_requests_the_attention_cannot_honour_are_refused(arguments, reason, tiny, tokens):
    model = sparsify(tiny("llama"), POWER)
    batch = arguments["position_ids"].shape[0] if "position_ids" in arguments else 1
    with pytest.raises(ModelError, match=reason):
        model(tokens(20).repeat(batch, 1), **arguments, use_cache=False)


def test_the_attention_name_without_a_method_is_refused(tiny, tokens):
    sparsify(tiny("llama"), POWER)
    model = tiny("llama")
    model.set_attn_implementation("sparsetrain")
    with pytest.raises(ModelError, match=r"call sparsetrain\.sparsify"):
        model(tokens(20))
