"""Adapters go to the text decoder, experts and all, and come back from disk in plain peft and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from small_families import small_model
from transformers import AutoModelForCausalLM

from sparsetrain.errors import RecipeError
from sparsetrain.modeling import save, sparsify
from sparsetrain.modeling.adapter_folder import adapter_tensors, read_adapters, save_adapters
from sparsetrain.modeling.adapters import add_adapters, merge_adapters
from sparsetrain.modeling.decoder import freeze_towers
from sparsetrain.recipe.schema import LoraSection, ModelSection
from sparsetrain.training.trainable import adapted_share

FULL = {"method": "full"}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))


def adapted(base, **lora):
    model = sparsify(copy.deepcopy(base), FULL)
    add_adapters(model, LoraSection(rank=2, **lora))
    return model


def with_adapters(model):
    """Names of the modules that have one."""
    return {name.partition(".lora_")[0] for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "jetmoe"])
def test_linear_means_the_experts_too_and_the_folder_is_read_by_plain_peft_and_merged(family, ids, tmp_path):
    base = small_model(family)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, targets="linear")
    assert adapted_share(model) > 0.96  # routers have none
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = model(ids, use_cache=False).logits
    wanted.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    names = adapter_tensors(model)
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    section = ModelSection(path=str(tmp_path / "base"), dtype="float32")
    save_adapters(model, tmp_path / "adapters", base=section, state_dict=tensors)

    def close(found):
        torch.testing.assert_close(found(ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)

    def plain(folder):
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()

    with torch.no_grad():
        close(PeftModel.from_pretrained(plain("base"), str(tmp_path / "adapters")).eval())
        again = sparsify(plain("base"), FULL)
        read_adapters(again, tmp_path / "adapters")
        close(again.eval())
        save(merge_adapters(again), tmp_path / "merged")
        close(plain("merged"))


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*layers\.\d+\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
        ("linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
    ids=["names", "expression", "linear"],
)
def test_a_vision_tower_with_layers_of_the_same_names_gets_nothing(targets, leaves, ids):
    model = adapted(small_model("gemma3"), targets=targets, train_norms=True, train_embeddings=True)
    assert {name.rpartition(".")[2] for name in with_adapters(model)} == leaves
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(part in name for name in trained) for part in ("norm", "embed_tokens"))
    assert not [name for name in trained if not name.startswith(("model.language_model.", "lm_head."))]
    model(ids, use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_full_training_of_a_model_with_a_vision_tower_trains_its_decoder(ids):
    model = sparsify(small_model("gemma3"), FULL)
    assert freeze_towers(model) == ["multi_modal_projector", "vision_tower"]
    model(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == ("language_model" in name), name
    assert freeze_towers(sparsify(small_model("llama"), FULL)) == []


@pytest.mark.parametrize(
    ("family", "lora", "reason"),
    [
        (
            "mixtral",
            {"targets": "linear", "dropout": 0.1},
            r"lora\.dropout=0\.1: peft does not support this for expert weights",
        ),
        ("mixtral", {"targets": ["down_proj"], "dora": True}, r"lora\.dora=True.*experts"),
        ("dbrx", {"targets": "linear"}, r"experts are stacked in .*w1"),
        ("mixtral", {"targets": ["w1"]}, r"lora\.targets: w1 matches no.*down_proj"),
        ("gemma3", {"targets": ["fc1"]}, r"lora\.targets: fc1 matches no linear layer .* decoder"),
    ],
)
def test_what_the_experts_cannot_have_is_refused_by_name(family, lora, reason):
    with pytest.raises(RecipeError, match=reason):
        adapted(small_model(family), **lora)


def test_attention_alone_takes_dropout_beside_experts():
    model = adapted(small_model("mixtral"), targets="attention", dropout=0.1)
    assert {name.rpartition(".")[2] for name in with_adapters(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
