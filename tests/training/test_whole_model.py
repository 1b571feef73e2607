"""What the whole model does beyond its decoder and head is trained, or found before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from small_families import small_model

from sparsetrain.data import Row, collate
from sparsetrain.errors import ModelError, TrainingError
from sparsetrain.modeling import has_plain_head, sparsify
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.preflight import check_balance
from sparsetrain.training.selfcheck import forward as selfcheck

TOKENS = 60
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


@pytest.fixture
def ids():
    return torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batch(ids):
    return collate([Row(ids[0].numpy(), ids[0].numpy(), [TOKENS], ["one"])])


@pytest.fixture
def inputs(ids):
    return {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS)[None],
        "cu_seqlens": torch.tensor([0, TOKENS]).int(),
    }


def sparsified(family, **fields):
    return sparsify(small_model(family, **fields), {"method": "full"}).train()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("family", "chunk", "checkpointed"),
    [("mixtral", 16, False), ("mixtral", None, False), ("mixtral", 16, True), ("granitemoe", 16, False)]
    + [(family, 16, False) for family in ("qwen3_moe", "jetmoe", "dbrx")],
)
def test_the_routers_balance_loss_is_that_of_the_model(family, chunk, checkpointed, ids, inputs):
    model = sparsified(family, output_router_logits=True)
    if not isinstance(model(**inputs).aux_loss, torch.Tensor):
        pytest.skip(f"transformers {transformers.__version__} computes no balance loss for {family}")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = CausalLMLoss(model, chunk)
    assert loss.chunk is None or has_plain_head(model)
    found = loss(**inputs, positions=torch.arange(TOKENS - 1), targets=ids[0, 1:], num_chunks=3) / (TOKENS - 1)
    wanted = model(**inputs, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    mine, whole = gradients(model, found), gradients(model, wanted)
    assert float((mine - whole).norm() / whole.norm()) < 1e-5
    model.config.output_router_logits = False
    without = CausalLMLoss(model, chunk)
    assert ("balance" in loss.describe(), "balance" in without.describe()) == (True, False)
    silent = without(**inputs, positions=torch.arange(TOKENS - 1), targets=ids[0, 1:], num_chunks=3) / (TOKENS - 1)
    assert float((gradients(model, silent) - whole).norm() / whole.norm()) > 1e-5


@pytest.mark.parametrize("nothing", [None, 0])
def test_a_balance_loss_that_is_asked_for_and_not_computed_is_refused(nothing, ids, inputs):
    model = sparsified("mixtral", output_router_logits=True)
    model.register_forward_hook(lambda _, __, output: output.__setitem__("aux_loss", nothing) or output)
    with pytest.raises(ModelError, match="computes no balance loss"):
        CausalLMLoss(model, 16)(**inputs, positions=torch.arange(8), targets=ids[0, :8], num_chunks=1)


def test_the_weight_of_a_micro_batch_scales_its_balance_loss_alone(ids, inputs):
    loss = CausalLMLoss(sparsified("mixtral", output_router_logits=True), 16)
    targets = {"positions": torch.arange(TOKENS - 1), "targets": ids[0, 1:], "num_chunks": 1}
    none, some = (loss(**inputs, **targets, balance_weight=torch.tensor(weight)) for weight in (0.0, 7.0))
    torch.testing.assert_close(some - none, 7.0 * loss.balance_loss, rtol=1e-2, atol=0)


def test_a_factor_without_the_loss_is_refused():
    section = SimpleNamespace(architecture=None, config_overrides={"router_aux_loss_coef": 0.01})
    with pytest.raises(ModelError, match=r"router_aux_loss_coef=0\.01 has no effect.*output_router_logits: true"):
        check_balance(sparsified("mixtral"), section)
    check_balance(sparsified("mixtral", output_router_logits=True), section)


def test_a_family_without_a_balance_loss_refuses_the_switch():
    with pytest.raises(ModelError, match=r"Llama.* has no known balance loss of its routers"):
        CausalLMLoss(sparsified("llama", output_router_logits=True), 16)


def test_a_loss_that_equals_the_model_passes(batch, world):
    for family, fields in (("llama", {}), ("mixtral", {"output_router_logits": True}), ("gemma2", {})):
        line = selfcheck.check_against_whole_model(
            CausalLMLoss(sparsified(family, **fields).to(world.device), 16), batch, world
        )
        assert "equal those of the whole model on 60 tokens" in line


def test_a_model_that_scales_its_logits_unseen_is_found(batch, world, monkeypatch):
    model = sparsified("cohere", logit_scale=0.5).to(world.device)
    loss = CausalLMLoss(model, None)
    loss.chunk = 16  # as if its config did not tell
    with pytest.raises(TrainingError, match=r"logits of CohereForCausalLM are not.*train\.loss_chunk: null"):
        selfcheck.check_against_whole_model(loss, batch, world)


def test_a_model_that_adds_to_its_loss_unseen_is_found(batch, world, monkeypatch):
    model = sparsified("llama").to(world.device)
    plain = model.loss_function
    model.loss_function = lambda logits, *args, **kwargs: plain(logits, *args, **kwargs) + logits.logsumexp(-1).mean()
    with pytest.raises(TrainingError, match="adds a term that would not be trained"):
        selfcheck.check_against_whole_model(CausalLMLoss(model, 16), batch, world)


def test_frequencies_chosen_by_the_longest_document_are_found(batch, world):
    model = sparsified("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=20).to(world.device)
    assert "equals itself alone" in next(selfcheck.check_document_alone(model, batch, world))
    del model.model.rotary_emb.forward  # transformers' own
    with pytest.raises(TrainingError, match="15 tokens differs behind one of 45 from itself alone"):
        next(selfcheck.check_document_alone(model, batch, world))


def test_a_model_that_cannot_pack_is_not_asked_to(batch, world):
    model = sparsified("qwen3_next").to(world.device)
    assert "each has its own row" in selfcheck.check_document_isolation(model, batch, world)
    assert list(selfcheck.check_document_alone(model, batch, world)) == []
    assert "equal those of the whole model" in selfcheck.check_against_whole_model(
        CausalLMLoss(model, 16), batch, world
    )
