"""Before step 1 a run proves that what it will save is what it trains, of families that transformers converts too."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsetrain.errors import TrainingError
from sparsetrain.modeling import load_model
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.training.output.export import export
from sparsetrain.training.selfcheck.round_trip import check_round_trip
from sparsetrain.training.trainable import choose_trainable

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3": None,
}
SPARSEK = {"method": "sparsek", "topk": 8, "window": 16, "sinks": 2, "replace_sliding_layers": True}


@pytest.fixture
def built(tiny_recipe, world):
    """``built(family, attention, **fields)``: recipe's model section, model on the world's device, and tokenizer."""

    def build(family, attention=None, **fields):
        recipe = tiny_recipe()
        common = {
            **{
                name: value
                for name, value in recipe.model.architecture.items()
                if name not in ("model_type", "num_key_value_heads")
            },
            "pad_token_id": 0,
            **({"num_key_value_heads": 2} if family != "gpt_neox" else {}),
            **(FAMILIES[family] or {}),
            **fields,
        }
        if family == "gemma3":
            vision = {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "image_size": 28,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 14,
            }
            common = {
                "text_config": {**common, "head_dim": 8, "sliding_window": 32, "tie_word_embeddings": True},
                "vision_config": vision,
                "mm_tokens_per_image": 4,
            }
        section = recipe.model.model_copy(update={"architecture": {"model_type": family, **common}})
        method = attention or {**recipe.attention.model_dump(), "replace_sliding_layers": True}
        model, tokenizer = load_model(section, method, seed=0)
        return section, model.to(world.device), tokenizer

    return build


@pytest.fixture
def checked(world, tmp_path):
    """``checked(section, model, tokenizer, spoil=...)``: the line of the check; ``spoil`` changes what was written."""

    def check(section, model, tokenizer, spoil=lambda folder: None):
        def write(target):
            export(model, tokenizer, target, world, section)
            spoil(target)

        line = check_round_trip(model, tmp_path, write, torch.arange(3, 60)[None], world)
        assert list(tmp_path.iterdir()) == []
        return line

    return check


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, None) for family in FAMILIES), *((family, SPARSEK) for family in ("llama", "mixtral", "gemma3"))],
)
def test_what_is_saved_of_a_family_is_the_model(family, attention, built, checked):
    section, model, tokenizer = built(family, attention)
    line = checked(section, model, tokenizer)
    tensors = len(list(model.parameters())) + sum(name in model.state_dict() for name, _ in model.named_buffers())
    assert line == f"saved and loaded again bit for bit: {tensors} tensors, logits of 57 tokens within 0.0e+00"


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"train_embeddings": True, "train_norms": True}])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_of_adapters_is_what_was_trained(lora, tied, built, checked):
    section, model, tokenizer = built("llama", SPARSEK, tie_word_embeddings=tied)
    add_adapters(model, LoraSection(rank=2, targets="attention", **lora))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    line = checked(section.model_copy(update={"path": "."}), model, tokenizer)
    assert "bit for bit" in line
    assert int(line.split()[7]) >= len(trained)


def test_what_no_text_reaches_is_frozen_and_saved(built, checked, tiny_recipe):
    section, model, tokenizer = built("gemma3")
    said = choose_trainable(model, tiny_recipe())
    assert "the language model without multi_modal_projector, vision_tower, which text does not use, " in said
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"multi_modal_projector", "vision_tower"}
    assert "62 tensors" in checked(section, model, tokenizer)


def edit(folder, act):
    """Change the tensors of a folder."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    act(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_save_that_drops_a_tensor_is_stopped(built, checked):
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(TrainingError, match=rf"self-check failed: .*{name}"):
        checked(*built("llama"), spoil=lambda folder: edit(folder, lambda tensors: tensors.pop(name)))


def test_a_save_of_other_values_is_stopped_by_the_name_in_the_model(built, checked):
    def swap(tensors):
        experts = [f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in (0, 1)]
        tensors[experts[0]], tensors[experts[1]] = tensors[experts[1]], tensors[experts[0]]

    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj differs after saving"):
        checked(*built("mixtral"), spoil=lambda folder: edit(folder, swap))


def test_a_config_that_computes_something_else_is_stopped(built, checked):
    def other_rotation(folder):
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 10.0
        (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(TrainingError, match="logits differ from the model's by"):
        checked(*built("llama"), spoil=other_rotation)


def test_adapters_that_come_back_different_are_stopped(built, checked):
    section, model, tokenizer = built("llama")
    add_adapters(model, LoraSection(rank=2, targets="attention"))

    def change(tensors):
        tensors[min(tensors)] += 1

    with pytest.raises(TrainingError, match=r"q_proj|k_proj|v_proj|o_proj.* differs after saving"):
        checked(section.model_copy(update={"path": "."}), model, tokenizer, spoil=lambda folder: edit(folder, change))
