"""Whatever is wrong in a folder of a model or of adapters, it loads and computes, or one error of ours says why not."""

from __future__ import annotations

import os
import random
from functools import partial

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import ModelError, SparsetrainError
from sparsetrain.modeling import load_model
from sparsetrain.modeling.adapter_folder import adapter_tensors, save_adapters
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.recipe.schema import LoraSection, ModelSection
from tests.modeling.hostile import Damage, damaged, damages

WHOLE = os.environ.get("SPARSETRAIN_SWEEP") == "1"
"""Try everything, which takes many minutes; otherwise a part that is always the same."""
TRIED = 40
POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
ROWS = torch.arange(3, 13)[None]


def chosen(folder) -> list[Damage]:
    everything = list(damages(folder))
    return everything if WHOLE else random.Random(0).sample(everything, TRIED)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A sparsified model of one layer in two shards, with a tokenizer and all the files that transformers writes."""
    from tests.modeling.conftest import build

    folder = tmp_path_factory.mktemp("hostile") / "model"
    model = build("llama", num_hidden_layers=1, vocab_size=300, bos_token_id=0, eos_token_id=1)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 2])
    sparsetrain.sparsify(model, POWER)
    model.save_pretrained(folder, max_shard_size="100KB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    sparsetrain.save(model, folder, tokenizer)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    return folder


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    section = ModelSection(path=str(model_folder), dtype="float32")
    model, tokenizer = load_model(section, POWER, seed=0)
    add_adapters(model, LoraSection(rank=2))
    tensors = {key: model.get_parameter_or_buffer(name) for name, key in adapter_tensors(model).items()}
    folder = tmp_path_factory.mktemp("hostile") / "adapters"
    save_adapters(model, folder, tokenizer, base=section, state_dict=tensors)
    return folder


def holds(act) -> str | None:
    """What is wrong with how an action ends; None if it succeeds or raises an error of ours."""
    try:
        act()
    except SparsetrainError as error:
        return None if str(error).strip() else "an error without words"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"[:300]
    return None


def call(command, codes) -> None:
    codes[command[0]] = main(command)


def computes(folder) -> None:
    """Load a folder by both doors, and compute."""
    models = [sparsetrain.load(folder)]
    if (folder / "config.json").exists():
        models.append(load_model(ModelSection(path=str(folder), dtype="float32"), POWER, seed=0)[0])
    for model in models:
        assert torch.isfinite(model(ROWS).logits).all(), "logits are not finite"


def test_a_damaged_model_loads_and_computes_or_is_refused(model_folder, tmp_path):
    faults = {}
    for damage in chosen(model_folder):
        folder = damaged(model_folder, damage, tmp_path / "model")
        if fault := holds(partial(computes, folder)):
            faults[str(damage)] = fault
    assert not faults


def test_damaged_adapters_load_and_compute_or_are_refused(adapter_folder, tmp_path):
    faults = {}
    for damage in chosen(adapter_folder):
        folder = damaged(adapter_folder, damage, tmp_path / "adapters")
        if fault := holds(partial(computes, folder)):
            faults[str(damage)] = fault
    assert not faults


def test_commands_pass_a_damaged_model_only_if_the_run_can_load_it(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a line"}\n')
    section = {"path": "model", "dtype": "float32"}
    recipe = {
        "model": section,
        "attention": POWER,
        "data": {"sources": [{"path": "text.jsonl"}]},
        "sequence": {"length": 64},
        "train": {"steps": 1, "lr": 1e-3},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    faults = {}
    for damage in chosen(model_folder)[: None if WHOLE else TRIED // 2]:
        damaged(model_folder, damage, tmp_path / "model")
        codes = {}
        for command in (["recipe", "validate", "r.yaml"], ["plan", "r.yaml"]):
            if fault := holds(partial(call, command, codes)):
                faults[f"{command[0]}: {damage}"] = fault
        try:
            load_model(ModelSection(**section), POWER, seed=0)
        except ModelError as error:
            if codes.get("recipe") == 0:
                faults[f"passed by validate: {damage}"] = str(error)[:200]
        except BaseException as error:
            faults[f"run: {damage}"] = f"{type(error).__name__}: {error}"[:300]
        else:
            said = capsys.readouterr().err
            # Of what is no part of the model the run tells elsewhere: an end token that data needs, a recipe's numbers.
            if codes.get("recipe") != 0 and "data.sources" not in said and "of its config" not in said:
                faults[f"refused by validate: {damage}"] = said[-300:]
        capsys.readouterr()
    assert not faults
