"""No file of a checkpoint has code run or a pickle read: one test for each way in which transformers or peft would."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, dynamic_module_utils

import sparsetrain
from sparsetrain.errors import ModelError
from sparsetrain.modeling import load_model
from sparsetrain.modeling.adapter_folder import load_adapters, save_adapters
from sparsetrain.modeling.adapters import add_adapters
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.schema import ModelSection

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
HUB_KERNEL = "nobody/attention"
OWN_CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Model: ...\n"


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.fixture
def folder(tiny, tmp_path):
    """A saved model with its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")), unk_token="w0"
    )
    model = tiny("llama")
    sparsetrain.save(sparsetrain.sparsify(model, POWER), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """No file of a test was run or unpickled, and nobody was asked whether it may be."""

    def forbidden(*arguments, **options):
        raise AssertionError("this must not be called")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(builtins, "input", forbidden)
    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", forbidden)
    yield
    assert not list(tmp_path.rglob("ran"))


def change(file, **fields):
    """Set fields of a JSON file; dots lead into mappings."""
    content = json.loads(file.read_text()) if file.exists() else {}
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = content
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    file.write_text(json.dumps(content))


def both(folder):
    """The model by each door that a user takes: as a saved one, and as a recipe's."""
    section = ModelSection(path=str(folder), dtype="float32")
    return sparsetrain.load(folder), load_model(section, POWER, seed=0)[0]


def refused(folder, match):
    with pytest.raises(ModelError, match=match):
        sparsetrain.load(folder)
    with pytest.raises(ModelError, match=match):
        load_model(ModelSection(path=str(folder), dtype="float32"), POWER, seed=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": HUB_KERNEL},
        {"attn_implementation": HUB_KERNEL},
        {"attn_implementation": {"": HUB_KERNEL}},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": HUB_KERNEL},
        {"_experts_implementation": HUB_KERNEL},
        {"experts_implementation": "deepgemm"},
        {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": f"{HUB_KERNEL}:Norm"}}},
        {"fusion_config": {"patch_embeddings": True}},
        {"distributed_config": {"tp_plan": "auto"}},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_config_does_not_choose_the_code_that_computes_a_model(folder, fields, tokens):
    right = sparsetrain.load(folder)(tokens(20)).logits
    change(folder / "config.json", **fields)
    for model in both(folder):
        assert torch.equal(model(tokens(20)).logits, right)


@pytest.mark.parametrize("text", ["null", "[]", "{"])
def test_a_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json (holds .* object|is not JSON)")


def test_a_part_of_a_config_does_not_choose_it_either(tmp_path, tokens, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "image_size": 28,
        "patch_size": 14,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config)
    sparsetrain.save(sparsetrain.sparsify(model, {**POWER, "replace_sliding_layers": True}), tmp_path / "gemma")
    fields = {"_attn_implementation": HUB_KERNEL, "auto_map": {"AutoModel": "code.Model"}}
    for part in ("text_config", "vision_config"):
        change(tmp_path / "gemma/config.json", **{f"{part}__{name}": value for name, value in fields.items()})
    assert torch.equal(sparsetrain.load(tmp_path / "gemma").eval()(tokens(20)).logits, model.eval()(tokens(20)).logits)


@pytest.mark.parametrize("family", ["llama", "no_family"])
@pytest.mark.parametrize("reference", ["code.Model", "nobody/repository--code.Model"])
def test_code_beside_a_model_runs_only_where_it_is_trusted(folder, family, reference):
    (folder / "code.py").write_text(OWN_CODE)
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), reference)
    change(folder / "config.json", auto_map=names, model_type=family)
    if family == "llama":
        both(folder)
    else:
        refused(folder, "no_family.*needs custom code, which runs only with trust_remote_code")


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "NoTokenizer"])
def test_code_beside_a_tokenizer_does_not_run(folder, kind):
    (folder / "code.py").write_text(OWN_CODE)
    names = {"AutoTokenizer": ["code.Model", "code.Model"]}
    change(folder / "tokenizer_config.json", auto_map=names, tokenizer_class=kind)
    section = ModelSection(path=str(folder), dtype="float32")
    if kind == "PreTrainedTokenizerFast":
        assert load_model(section, POWER, seed=0)[1]("w3")["input_ids"] == [3]
    else:
        with pytest.raises(ModelError, match="needs custom code, which runs only with trust_remote_code"):
            load_model(section, POWER, seed=0)


def test_code_for_generation_processors_and_pipelines_is_not_loaded(folder, tokens):
    (folder / "custom_generate").mkdir()
    for file in (folder / "custom_generate/generate.py", folder / "code.py"):
        file.write_text(OWN_CODE)
    change(folder / "config.json", custom_pipelines={"text-generation": {"impl": "code.Model", "pt": ["code.Model"]}})
    change(folder / "generation_config.json", custom_generate="custom_generate", auto_map={"AutoModel": "code.Model"})
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        change(folder / name, auto_map={"AutoProcessor": "code.Model"}, processor_class="Model")
    for model in both(folder):
        model.generate(tokens(8), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", ["weights.bin", "../weights.safetensors", "/tmp/weights.safetensors", "weights.pt", 3])
def test_an_index_leads_to_safetensors_in_the_folder_alone(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    for file in ("weights.bin", "weights.pt"):
        (folder / file).write_bytes(pickle.dumps(Payload(folder / "ran")))
    shards = dict.fromkeys(load_file(folder.parent / "weights.safetensors"), name)
    change(folder / "model.safetensors.index.json", metadata={}, weight_map=shards)
    refused(folder, r"model\.safetensors\.index\.json .* maps .* which is not a safetensors file in it")


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors.index.json", "../m.safetensors", "x.bin", 7])
def test_a_config_names_no_other_weights_than_safetensors(folder, name):
    for file in ("adapter_model.bin", "x.bin"):
        (folder / file).write_bytes(pickle.dumps(Payload(folder / "ran")))
    change(folder / "other.safetensors.index.json", weight_map={"lm_head.weight": "x.bin"})
    change(folder / "config.json", transformers_weights=name)
    refused(folder, "no(t a)? safetensors file in it")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickled_weights_are_told_and_not_read(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(folder / "ran")))
    refused(folder, f"holds its weights as a pickle .{name}., which is never read; convert to safetensors")


def test_pickled_shards_are_told_and_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))
    change(folder / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": "pytorch_model-00001-of-00001.bin"})
    refused(folder, "as a pickle")


def test_pickles_cannot_be_asked_for(folder):
    with pytest.raises(ModelError, match="use_safetensors=False"):
        sparsetrain.load(folder, use_safetensors=False)


def test_adapters_in_a_models_folder_do_not_lead_to_another_base(folder):
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="nobody/base", r=2)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))
    with pytest.raises(ModelError, match=r"holds adapters \(adapter_config\.json\), but a model is expected"):
        load_model(ModelSection(path=str(folder), dtype="float32"), POWER, seed=0)


@pytest.mark.parametrize("method", ["gptq", "awq", "quark", "torchao", "auto-round", "hqq", "no_method", None])
def test_a_quantisation_that_loads_a_library_is_refused_by_name(folder, method):
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, f"is quantised by {method}, which can be neither trained nor unpacked")


@pytest.fixture
def adapters(folder):
    """A folder of adapters of the model."""
    section = ModelSection(path=str(folder), dtype="float32")
    model, tokenizer = load_model(section, POWER, seed=0)
    add_adapters(model, LoraSection(rank=2))
    from sparsetrain.modeling.adapter_folder import adapter_tensors

    state = {key: model.get_parameter(name).detach() for name, key in adapter_tensors(model).items()}
    save_adapters(model, folder.parent / "adapters", tokenizer, base=section, state_dict=state)
    return folder.parent / "adapters"


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"hidden_size": 1}, "megatron_core": "antigravity"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "eva"},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
        {"use_qalora": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_adapters_say_which_tensors_there_are_and_nothing_else(adapters, fields):
    load_adapters(adapters)
    change(adapters / "adapter_config.json", **fields)
    with pytest.raises(ModelError, match=rf"{next(iter(fields))}=.* is not supported|cannot read the adapters"):
        load_adapters(adapters)


def test_the_module_that_an_adapter_names_is_not_imported(adapters):
    change(adapters / "adapter_config.json", auto_mapping={"parent_library": "antigravity", "base_model_class": "X"})
    load_adapters(adapters)
    import sys

    assert "antigravity" not in sys.modules


def test_pickled_adapters_are_told_and_not_read(adapters):
    (adapters / "adapter_model.safetensors").unlink()
    (adapters / "adapter_model.bin").write_bytes(pickle.dumps(Payload(adapters / "ran")))
    with pytest.raises(ModelError, match=r"holds adapters as a pickle \(adapter_model\.bin\)"):
        load_adapters(adapters)


def test_a_record_of_adapters_does_not_allow_code(adapters, folder):
    (folder / "code.py").write_text(OWN_CODE)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Model"})
    change(adapters / "sparsetrain.json", model__trust_remote_code=True)
    load_adapters(adapters)


def test_packed_weights_are_not_read_without_their_scales(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, f"{name}_scale_inv": torch.ones(1, 1)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"holds packed weights .*up_proj\.weight_scale_inv.* restore its quantization_config")
    activations = {f"model.layers.0.{part}": torch.ones(1) for part in ("self_attn.k_scale", "mlp.up_proj.input_scale")}
    save_file({**weights, **activations}, folder / "model.safetensors", {"format": "pt"})
    both(folder)
    # Scales under a name that transformers does not look for.
    change(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    save_file({**weights, f"{name}_scale": torch.ones(1, 1)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"holds packed weights .*up_proj\.weight_scale.* in another format than its config\.json says")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_plain_weights_that_the_config_calls_packed_are_told(folder, method):
    change(folder / "config.json", quantization_config={"quant_method": method})
    refused(
        folder, r"its config\.json says that weights are packed \(quantization_config\), but the files hold unpacked"
    )


def test_packed_weights_whose_library_is_missing_are_told(folder):
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(folder, r"is quantised by bitsandbytes: .*pip install -U bitsandbytes")


def test_the_whole_file_comes_before_an_index_for_all_weights(folder, tokens):
    """Scorers too, which are read by ourselves: from the file that transformers reads the rest from."""
    model = sparsetrain.sparsify(sparsetrain.load(folder), {"method": "sparsek", "topk": 4, "window": 4})
    sparsetrain.save(model, folder)
    right = sparsetrain.load(folder)(tokens(20)).logits
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "model-1.safetensors", {"format": "pt"})
    places = dict.fromkeys(weights, "model-1.safetensors")
    change(folder / "model.safetensors.index.json", metadata={}, weight_map=places)
    assert torch.equal(sparsetrain.load(folder)(tokens(20)).logits, right)


def test_a_bias_that_the_config_leaves_out_is_told(folder):
    weights = load_file(folder / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(256)}
    save_file({**weights, **bias}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"holds 1 weights that LlamaForCausalLM with this config does not have: .*q_proj\.bias")


def test_the_folder_of_a_run_names_its_model(folder, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints/step-000004"
    checkpoint.mkdir(parents=True)
    for file in (run / "recipe.yaml", *(checkpoint / name for name in ("recipe.yaml", "state.json", "manifest.json"))):
        file.write_text("{}")
    places = {run: "the folder of a run", checkpoint.parent: "the folder of checkpoints", checkpoint: "a checkpoint"}
    for path, kind in places.items():
        refused(path, f"is {kind}.* holds no model: continue the run with --resume; at its end it writes {run}/final")
    shutil.copytree(folder, run / "final")
    for path, kind in places.items():
        refused(path, rf"is {kind}.*; the model that the run trained is {run}/final \(sparsetrain export copies it\)")
    sparsetrain.load(run / "final")
