"""Added tokens have rows in embedding and head, which are trained beside adapters, saved, merged and read by peft."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sparsetrain.modeling.adapter_folder import adapter_tensors, load_adapters, save_adapters
from sparsetrain.modeling.adapters import add_adapters, merge_adapters
from sparsetrain.modeling.storage import load_model, save
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.training.memory.liger import can_fuse_loss

START, END = "<|im_start|>", "<|im_end|>"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FULL = {"method": "full"}
LORA = LoraSection(rank=2)


@pytest.fixture
def base(tmp_path):
    """Saves a small model of 257 tokens, tied or not; returns its section of a recipe with two tokens more."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")

    def make(tied, family="llama", rows=257, tokens=(START, END)):
        shape = {"model_type": family, **SIZES, "vocab_size": rows, "tie_word_embeddings": tied}
        if family != "gpt2":
            shape["num_key_value_heads"] = 1
        section = ModelSection(architecture=shape, tokenizer=str(tmp_path / "tokenizer"), dtype="float32")
        model, tokenizer = load_model(section, FULL, seed=0)
        folder = tmp_path / f"base-{tied}-{family}-{rows}"
        save(model, folder, tokenizer)
        return ModelSection(path=str(folder), dtype="float32", add_tokens=list(tokens))

    return make


def tables(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def logits(model, tokens=(97, 257, 98, 258, 99)):
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def trained(model, steps=3):
    """The model after some steps that see the new tokens; its parameters are asked for a gradient as in a run."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([[97, 257, 98, 258, 99, 257, 100, 258]])
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_vocabulary_grows_and_new_rows_begin_at_the_mean_of_the_others(tied, base):
    section = base(tied)
    before, _ = load_model(section.model_copy(update={"add_tokens": []}), FULL, seed=0)
    model, tokenizer = load_model(section, FULL, seed=1)
    again, _ = load_model(section, FULL, seed=2)
    assert tokenizer(f"a{START}b")["input_ids"] == [64, 257, 65]
    assert tokenizer.decode([257, 64], skip_special_tokens=True) == "a"
    assert model.config.vocab_size == 320
    for old, table, same in zip(tables(before), tables(model), tables(again)):
        assert table.shape == (320, 16)
        assert torch.equal(table[:257], old)
        assert torch.equal(table, same)
        assert (table[257:] - old.mean(0)).abs().max() < 0.1 * old.std()
        assert not torch.equal(table[257], table[258])


def test_spare_rows_are_used_and_tokens_that_are_there_keep_theirs(base):
    section = base(True, rows=300, tokens=[START, "<eos>"])
    before, _ = load_model(section.model_copy(update={"add_tokens": []}), FULL, seed=0)
    model, tokenizer = load_model(section, FULL, seed=0)
    changed = (tables(model)[0] != tables(before)[0]).any(-1).nonzero().flatten().tolist()
    assert changed == [257] == [tokenizer.convert_tokens_to_ids(START)]


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_are_trained_beside_adapters_saved_loaded_and_merged(tied, family, base, tmp_path):
    section = base(tied, family)
    model, tokenizer = load_model(section, FULL, seed=0)
    untouched = [table.detach().clone() for table in tables(model)]
    plain = logits(model)
    add_adapters(model, LORA)
    assert torch.allclose(logits(model), plain, atol=1e-6)
    assert not can_fuse_loss(model)
    assert logits(trained(model)).isfinite().all()
    rows = {name: p for name, p in model.named_parameters() if name.endswith("token_rows")}
    assert len(rows) == (1 if tied else 2)
    for table, same in zip(tables(model), untouched):
        assert torch.equal(table, same)
    for changed, same in zip(rows.values(), untouched):
        assert ((changed - same[257:259]).abs().amax(-1) > 0.05).all()

    names = adapter_tensors(model)
    save_adapters(
        model, tmp_path / "adapters", tokenizer, base=section,
        state_dict={key: model.state_dict()[name] for name, key in names.items()},
    )  # fmt: skip
    loaded = load_adapters(tmp_path / "adapters")
    assert torch.equal(logits(loaded), logits(model))

    theirs = AutoModelForCausalLM.from_pretrained(section.path, dtype=torch.float32)
    theirs.resize_token_embeddings(320)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapters")
    # Of the rows beyond the tokens, which are padding, this base has others.
    assert torch.allclose(logits(theirs)[..., :259], logits(model)[..., :259], atol=1e-5)

    merged = merge_adapters(loaded)
    assert "token_rows" not in dict(merged.named_parameters()).keys() | merged.state_dict().keys()
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    save(merged, tmp_path / "merged", tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(whole), logits(model), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(END) == 258


def test_beside_a_trained_embedding_only_an_untied_head_has_rows(base):
    for tied in (True, False):
        model, _ = load_model(base(tied), FULL, seed=0)
        add_adapters(model, LoraSection(rank=2, train_embeddings=True))
        names = [name for name, _ in model.named_parameters() if name.endswith("token_rows")]
        assert names == ([] if tied else ["lm_head.token_rows"])


@pytest.mark.parametrize("tokens", [[START, START], [" a"], ["a\n"], [""]])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValidationError, match="add_tokens"):
        ModelSection(path="x", add_tokens=tokens)
