"""Merged adapters are the model that was trained: compared with it, and with what plain transformers loads of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import CheckpointError, ModelError
from sparsetrain.modeling import load_model
from sparsetrain.modeling.adapter_folder import load_adapters
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.modeling.reread import relative_error
from sparsetrain.modeling.weights import check_headers, load_weights
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.schema import ModelSection
from sparsetrain.training.output import merge as merging
from sparsetrain.training.output.export import export
from sparsetrain.training.output.merge import write_merged

BLOCK = 16


def to_fp8(folder, block=BLOCK):
    """Pack the projections of a folder as DeepSeek does: 8 bits, and a scale for each square."""
    weights, packed = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        if "_proj" not in name:
            packed[name] = weight
            continue
        rows, columns = (size // block for size in weight.shape)
        squares = weight.float().reshape(rows, block, columns, block)
        scales = squares.abs().amax((1, 3)) / 448
        packed[name] = (squares / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
        packed[f"{name}_scale_inv"] = scales
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def bases(pretrained, tiny_recipe, tmp_path):
    """``bases(kind)``: a folder with a base."""

    def make(kind):
        folder = shutil.copytree(pretrained / ("tied" if kind == "tied" else "untied"), tmp_path / kind)
        if kind == "mixtral":
            torch.manual_seed(0)
            experts = {"model_type": kind, "num_local_experts": 4, "num_experts_per_tok": 2}
            config = AutoConfig.for_model(**{**tiny_recipe().model.architecture, **experts})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        if kind == "fp8":
            to_fp8(folder)
        return folder

    return make


@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_all_of_an_fp8_base_has_the_dtype_asked_for(bases, stored, dtype):
    folder = bases("fp8")
    weights = load_file(folder / "model.safetensors")
    plain = {name: w.to(stored) if w.dtype != torch.float8_e4m3fn else w for name, w in weights.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_weights(str(folder), "model.path", config=AutoConfig.from_pretrained(folder), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_fp8_weights_that_end_within_a_tile_are_refused(bases):
    folder = bases("fp8")
    weights = load_file(folder / "model.safetensors")
    rows = weights["model.layers.0.mlp.up_proj.weight"].shape[0]
    size = rows - BLOCK  # one whole tile and a part
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [size, BLOCK]
    (folder / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(
        {**weights, name: weights[name][:2].contiguous()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = AutoConfig.from_pretrained(folder)
    for check in (
        lambda: load_weights(str(folder), "model.path", config=config, dtype=torch.float32),
        lambda: check_headers(str(folder), "model.path", LlamaForCausalLM, config),
    ):
        with pytest.raises(
            ModelError, match=r"end within a tile of \[.*up_proj\.weight is .*use the original unquantised"
        ):
            check()


@pytest.fixture
def adapted(bases, tiny_recipe, world, tmp_path):
    """``adapted(kind, **lora)``: a folder of adapters that change a base of that kind."""

    def make(kind, **lora):
        recipe = tiny_recipe()
        section = ModelSection(path=str(bases(kind)), dtype="float32")
        model, tokenizer = load_model(section, recipe.attention, seed=0)
        add_adapters(model, LoraSection(rank=2, **lora))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        export(model, tokenizer, tmp_path / "adapters", world, section)
        return tmp_path / "adapters"

    return make


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("untied", {"dora": True, "train_norms": True, "targets": "linear"}),
        ("tied", {"train_embeddings": True}),
        ("mixtral", {}),
        ("fp8", {"targets": "linear"}),
    ],
)
def test_a_merged_model_is_the_model_trained(kind, lora, adapted, tmp_path):
    adapters, out = adapted(kind, **lora), tmp_path / "out"
    out.mkdir()
    write_merged(adapters, out, None)
    long, short = torch.arange(3, 200)[None], torch.arange(3, 19)[None]  # the pattern covers the short one whole
    model = load_adapters(adapters)
    plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    with torch.no_grad():
        assert relative_error(sparsetrain.load(out)(long).logits, model(long).logits) < 1e-5
        assert relative_error(plain(short).logits, model(short).logits) < 1e-5
    assert not any(info[fault] for fault in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    assert plain.dtype == torch.float32
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(adapters).get_vocab()
    assert not list(out.glob("adapter*"))


def test_a_merge_that_goes_wrong_is_refused(adapted, tmp_path, monkeypatch):
    adapters, out = adapted("untied"), tmp_path / "out"
    out.mkdir()
    merge, save = merging.merge_adapters, merging.save

    def changed(model, amount):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(amount)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(merging, "merge_adapters", lambda model: changed(merge(model), 1))
        with pytest.raises(CheckpointError, match="merged, the model's logits differ by"):
            write_merged(adapters, out, None)

    def save_another(model, target):
        save(changed(model, 1), target)
        changed(model, -1)

    monkeypatch.setattr(merging, "save", save_another)
    lost = r"the reloaded merged model differs from the saved one: model\.layers\.0\.mlp\.up_proj\.weight is different"
    with pytest.raises(CheckpointError, match=lost):
        write_merged(adapters, out, None)


def test_a_tokenizer_is_saved_with_the_length_trained_at(bases, tiny, tmp_path):
    base, run = bases("untied"), tmp_path / "run"
    config = base / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 128}))
    model = json.dumps({"path": str(base), "dtype": "float32", "config_overrides": {"max_position_embeddings": 1024}})
    short = ["train.steps=2", "train.global_batch_sequences=1", "sequence.length=1024"]
    assert main(["run", str(tiny), f"model={model}", "lora={rank: 2}", *short, "--output", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--merge"]) == 0
    for folder in (run / "final", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 1024
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 1024
