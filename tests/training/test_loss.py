from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain.logits import LOGIT_TRANSFORMS
from sparsetrain.modeling import sparsify
from sparsetrain.modeling.head import has_plain_head
from sparsetrain.training.loss import CausalLMLoss

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}


def build(family, **fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **fields), dtype=torch.float32)
    return sparsify(model, {"method": "power", "block": 8, "window": 1, "sinks": 1})


@pytest.fixture
def inputs():
    """Two packed documents of 50 and 30 tokens, with targets at every third position."""
    ids = torch.randint(96, (1, 80), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(0, 49, 3), torch.arange(50, 79, 3)])
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(50), torch.arange(30)])[None],
        "cu_seqlens": torch.tensor([0, 50, 80], dtype=torch.int32),
        "positions": positions,
        "targets": ids[0, positions + 1],
    }


def loss_and_gradients(model, inputs, chunk, num_chunks):
    model.zero_grad()
    loss = CausalLMLoss(model, chunk)(**inputs, num_chunks=num_chunks)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_chunks", [1, 4, 60])
def test_chunks_change_nothing(inputs, tied, num_chunks):
    """60 chunks of 27 positions: some are empty."""
    model = build("llama", tie_word_embeddings=tied)
    wanted, gradients = loss_and_gradients(model, inputs, None, 1)
    found, chunked = loss_and_gradients(model, inputs, 8, num_chunks)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5)


def test_it_is_the_summed_loss_of_each_document_alone(inputs):
    model = build("llama")
    total = 0.0
    for start, stop in ((0, 50), (50, 80)):
        ids = inputs["input_ids"][:, start:stop]
        mine = inputs["positions"][(inputs["positions"] >= start) & (inputs["positions"] < stop)] - start
        logits = model(ids, use_cache=False).logits[0, mine]
        total += F.cross_entropy(logits, ids[0, mine + 1], reduction="sum").item()
    assert CausalLMLoss(model, 8)(**inputs, num_chunks=4).item() == pytest.approx(total, rel=1e-5)


def test_a_batch_without_targets_has_no_loss_and_gradients_of_zero(inputs):
    inputs |= {"positions": torch.empty(0, dtype=torch.int64), "targets": torch.empty(0, dtype=torch.int64)}
    loss, gradients = loss_and_gradients(build("llama"), inputs, 8, 4)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_logits_never_exist_at_once(inputs):
    model, rows = build("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    CausalLMLoss(model, 8)(**inputs, num_chunks=4).backward()
    assert sum(rows) == 2 * 27
    assert max(rows) == 7


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_a_model_that_changes_its_logits_computes_them_itself(inputs, family, fields):
    config = {key: value for key, value in SHAPE.items() if not (family in ("cohere", "granite") and key == "head_dim")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config, **fields), dtype=torch.float32)
    sparsify(model, {"method": "power", "block": 8, "window": 1, "sinks": 1})
    assert not has_plain_head(model)
    loss = CausalLMLoss(model, 8)(**inputs, num_chunks=4)
    keys = ("input_ids", "position_ids", "cu_seqlens")
    logits = model(**{key: inputs[key] for key in keys}, use_cache=False).logits[0, inputs["positions"]]
    torch.testing.assert_close(loss, F.cross_entropy(logits, inputs["targets"], reduction="sum"))
    raw = model.get_output_embeddings()(
        model.get_decoder()(**{key: inputs[key] for key in keys}, use_cache=False).last_hidden_state[0]
    )
    assert not torch.allclose(raw[inputs["positions"]], logits, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "phi3", "gpt_oss", "olmo2"])
def test_plain_heads_are_recognised_and_truly_plain(inputs, family):
    fields = {"pad_token_id": 0} if family == "phi3" else {}
    fields |= {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "gpt_oss" else {}
    model = build(family, **fields)
    assert has_plain_head(model)
    assert not any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in LOGIT_TRANSFORMS)
    whole = CausalLMLoss(model, None)(**inputs, num_chunks=1)
    torch.testing.assert_close(CausalLMLoss(model, 8)(**inputs, num_chunks=4), whole)
