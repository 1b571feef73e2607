"""What a chat template writes, against the model: where generation stops, and what LoRA cannot learn."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.training.chat_tokens import set_end_tokens

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "the sky"}]
ROW = {"messages": [*QUESTION, {"role": "assistant", "content": "blue"}]}


@pytest.fixture(scope="module")
def chat(tiny, tmp_path_factory):
    """A base with untied head and rows for two control tokens; its tokenizer's template ends turns with one of them."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny.parent / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.2, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    recipe = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "attention": {"method": "full"},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}]},
        "sequence": {"length": 32},
        "train": {"steps": 25, "micro_batch": 1, "lr": 2e-2, "schedule": "constant"},
        "wandb": {"mode": "disabled"},
    }
    (folder / "chat.yaml").write_text(json.dumps(recipe))
    return folder


def answer(model, tokenizer):
    """The greedy answer to the question; at most 20 tokens."""
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(asked, max_new_tokens=20, do_sample=False)[0, asked.shape[1] :])


@pytest.mark.parametrize("lora", [None, "{rank: 32, targets: [q_proj, v_proj, o_proj, up_proj, down_proj, lm_head]}"])
def test_a_model_that_learned_another_end_token_stops_there(chat, lora, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["run", str(chat / "chat.yaml"), *([f"lora={lora}"] if lora else []), f"output={run}"]) == 0
    assert "turns end with '<|end|>', added to eos_token_id" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), *(["--merge"] if lora else [])]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == stops
    models = [sparsetrain.load(run / "final"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")]
    assert [answer(model, tokenizer) for model in models] == ["blue<|end|>"] * 2


@pytest.fixture
def settled(chat):
    def settle(change=lambda model: None, **lora):
        model = AutoModelForCausalLM.from_pretrained(chat / "base")
        tokenizer = AutoTokenizer.from_pretrained(chat / "base")
        with torch.no_grad():
            change(model)
        return "\n".join(set_end_tokens(model, tokenizer, LoraSection(**lora)))

    return settle


def zero(model):
    """The rows of both control tokens as a base that never saw them has them."""
    model.get_input_embeddings().weight[-2:] = 0
    model.get_output_embeddings().weight[-2:] = 0


def equal(model):
    """The same, where the rows of tokens never seen are all alike."""
    model.get_input_embeddings().weight[-2:] = model.get_input_embeddings().weight[-3]


def test_control_tokens_that_the_base_never_trained_and_lora_leaves_frozen_are_named(settled):
    assert "warning" not in settled()
    assert "never trained the embedding of '<|start|>', '<|end|>'" in settled(equal)
    said = settled(zero)
    assert "never trained the embedding of '<|start|>', '<|end|>', which the chat template writes" in said
    assert "never trained the output row of '<|end|>', which ends turns" in said
    said = settled(zero, train_embeddings=True)
    assert "the embedding of" not in said
    assert "the output row of '<|end|>'" in said
    assert "warning" not in settled(zero, train_embeddings=True, targets=["q_proj", "lm_head"])
