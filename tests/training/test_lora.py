"""LoRA runs: what is trained, what is saved, and that it comes back, with plain peft and with ours."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.modeling import load_model
from sparsetrain.modeling.adapter_folder import load_adapters, read_adapters
from sparsetrain.modeling.adapters import add_adapters, merge_adapters
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.training import run as training
from sparsetrain.training.checkpoints import read_weights

ALL_KINDS = "lora={rank: 4, targets: linear, dropout: 0.1, train_embeddings: true, train_norms: true}"
TOKENS = torch.arange(5, 125)[None]


@pytest.fixture(scope="module")
def arguments(tiny, pretrained):
    """``arguments(output, *overrides, tied=False)``: the command that trains adapters beside a pretrained model."""

    def command(output, *overrides, tied=False):
        path = pretrained / ("tied" if tied else "untied")
        model = json.dumps({"path": str(path), "dtype": "float32"})
        short = ["train.steps=2", "train.global_batch_sequences=2", "train.lr=0.05"]
        return ["run", str(tiny), f"model={model}", "lora={rank: 4}", *short, *overrides, "--output", str(output)]

    return command


@pytest.fixture(scope="module")
def trained(arguments, shared, run_folder):
    """A run of every kind of trained parameter under activation checkpointing, with a tied and an untied head."""

    def make(folder):
        for name in ("tied", "untied"):
            overrides = [ALL_KINDS, "train.activation_checkpointing=layer"]
            assert main(arguments(folder / name, *overrides, tied=name == "tied")) == 0

    folder = shared("lora-runs", make)
    return {name: run_folder(folder / name) for name in ("tied", "untied")}


@pytest.fixture
def attention_adapters(tmp_path, arguments, shared):
    """A copy of a ``final/`` whose tensors fit every decoder of the size of the base."""
    made = shared("lora-attention", lambda folder: main(arguments(folder / "run")))
    return shutil.copytree(made / "run/final", tmp_path / "adapters")


@pytest.fixture
def model(tiny_recipe, pretrained):
    """``model(**lora)``: the untied model with adapters, not trained."""

    def build(**lora):
        recipe = tiny_recipe(f"model={json.dumps({'path': str(pretrained / 'untied'), 'dtype': 'float32'})}")
        found, _ = load_model(recipe.model, recipe.attention, seed=0)
        add_adapters(found, LoraSection(**lora))
        return found

    return build


def adapted(model):
    """Names of the layers that have an adapter."""
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_plain_peft_opens_what_was_saved(trained, pretrained, head, recwarn):
    final = trained[head].path / "final"
    base = sparsetrain.sparsify(
        AutoModelForCausalLM.from_pretrained(pretrained / head, dtype=torch.float32),
        {"method": "power", "block": 16, "window": 2, "sinks": 1},
    )
    before = logits(base)
    opened = PeftModel.from_pretrained(base, final)
    assert not [str(warning.message) for warning in recwarn if "missing" in str(warning.message)]
    ours = logits(load_adapters(final))
    torch.testing.assert_close(logits(opened), ours, rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 0.05


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_merged_adapters_are_the_same_model(trained, tmp_path, head):
    final = trained[head].path / "final"
    model = load_adapters(final)
    expected = logits(model)
    merged = merge_adapters(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-5)
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert main(["export", str(trained[head].path), str(tmp_path / "out"), "--merge"]) == 0
    torch.testing.assert_close(logits(sparsetrain.load(tmp_path / "out")), expected, rtol=0, atol=2e-5)
    assert (tmp_path / "out/generation_config.json").is_file()
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) is (head == "tied")


def test_the_variants_of_lora_come_back_through_plain_peft(tmp_path, arguments, pretrained):
    assert main(arguments(tmp_path / "run", "lora={rank: 4, dora: true, rslora: true}")) == 0
    base = AutoModelForCausalLM.from_pretrained(pretrained / "untied", dtype=torch.float32)
    sparsetrain.sparsify(base, {"method": "power", "block": 16, "window": 2, "sinks": 1})
    opened = PeftModel.from_pretrained(base, tmp_path / "run/final")
    model = load_adapters(tmp_path / "run/final")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)
    expected = logits(model)
    torch.testing.assert_close(logits(merge_adapters(model)), expected, rtol=0, atol=2e-5)


def test_what_is_frozen_stays_as_it_was_bit_for_bit(tmp_path, arguments, pretrained, monkeypatch):
    seen = []

    def load_and_keep(*given, **settings):
        seen.append(load_model(*given, **settings))
        return seen[0]

    monkeypatch.setattr(training, "load_model", load_and_keep)
    overrides = ["lora={rank: 4, train_norms: true}", "train.optimizer.weight_decay=0.5"]
    assert main(arguments(tmp_path / "run", *overrides)) == 0
    before = load_file(pretrained / "untied/model.safetensors")
    after = {name.replace(".base_layer", ""): tensor for name, tensor in seen[0][0].state_dict().items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "norm" in name}
    assert all(after[name].abs().max() > 0 for name in after if "lora_B" in name)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, arguments, run_folder, stage, dtype):
    whole, resumed = run_folder(tmp_path / "whole"), run_folder(tmp_path / "resumed")
    overrides = [ALL_KINDS, f"deepspeed.stage={stage}", f"model.dtype={dtype}", "checkpoint.every=1"]
    assert main(arguments(whole.path, *overrides, tied=True)) == 0
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.path / "checkpoints/step-000002")
    shutil.rmtree(resumed.path / "final")
    assert main([*arguments(resumed.path, *overrides, tied=True), "--resume"]) == 0
    assert resumed.values("loss") == whole.values("loss")
    assert resumed.values("grad_norm") == whole.values("grad_norm")
    ours, theirs = (load_file(run.path / "final/adapter_model.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_checkpoints_hold_no_frozen_weight(tmp_path, arguments, stage):
    """Nor the output projection that is tied to a frozen embedding."""
    assert main(arguments(tmp_path / "run", f"deepspeed.stage={stage}", tied=True)) == 0
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    weights = read_weights(checkpoint)
    assert {name.rpartition(".lora_")[2] for name in weights} == {"A.default.weight", "B.default.weight"}
    elements = sum(2 * 4 * 32 + 2 * 4 * 24 for _ in range(4))
    assert sum(weight.numel() for weight in weights.values()) == elements
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 12 * elements * 4


def test_two_ranks_under_zero_3_train_as_one_without(tmp_path, arguments, ranks_of, run_folder):
    overrides = [ALL_KINDS, "lora.dropout=0", "train.activation_checkpointing=layer", "eval.at_end=true"]
    overrides += [
        "eval.tasks.perplexity={lengths: [64], tokens: 512, source: {path: python-stdlib, split: validation}}"
    ]
    alone, together = run_folder(tmp_path / "alone"), run_folder(tmp_path / "together")
    commands = [arguments(together.path, *overrides, "deepspeed.stage=3", "checkpoint.every=1", tied=True)]
    ranks_of(commands, tmp_path / "log", 2).wait()
    assert main(arguments(alone.path, *overrides, "deepspeed.stage=0", tied=True)) == 0
    assert together.values("loss") == pytest.approx(alone.values("loss"), rel=2e-6)
    assert together.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-4)
    ours, theirs = (load_file(run.path / "final/adapter_model.safetensors") for run in (together, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.numel() > 0
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)

    # The first half again, by both ranks.
    shutil.rmtree(together.path / "checkpoints/step-000002")
    commands[0].append("--resume")
    ranks_of(commands, tmp_path / "log", 2).wait()
    again = load_file(together.path / "final/adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


@pytest.fixture
def biased(tmp_path, pretrained):
    """A base whose projections of queries, keys and values have biases."""
    fields = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("qwen2", vocab_size=384, num_key_value_heads=2, **fields)
    folder = tmp_path / "biased"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in (pretrained / "untied").glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def expert(tmp_path, pretrained):
    """A base whose layers keep the matrices of four experts in one tensor."""
    folder = shutil.copytree(pretrained / "untied", tmp_path / "expert")
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=384, max_position_embeddings=512, **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("base", "kind"), [("biased", "dora: true"), ("expert", "dora: false")])
def test_adapters_that_read_the_weights_of_other_modules_train_under_zero_3_as_without(
    tmp_path, arguments, ranks_of, run_folder, request, base, kind
):
    """The magnitudes of DoRA, and adapters of experts. Each rank has a part of those weights."""
    overrides = [f"lora={{rank: 4, targets: linear, {kind}}}", "train.activation_checkpointing=layer"]
    overrides.append(f"model.path={request.getfixturevalue(base)}")
    alone, together = run_folder(tmp_path / "alone"), run_folder(tmp_path / "together")
    # Left to itself DeepSpeed keeps weights as small as these on every rank.
    sharded = "deepspeed.config={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    commands = [arguments(together.path, *overrides, "deepspeed.stage=3", sharded)]
    ranks_of(commands, tmp_path / "log", 2).wait()
    assert main(arguments(alone.path, *overrides, "deepspeed.stage=2")) == 0
    assert together.values("loss") == pytest.approx(alone.values("loss"), rel=2e-6)
    assert together.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-4)
    ours, theirs = (load_file(run.path / "final/adapter_model.safetensors") for run in (together, alone))
    assert any("magnitude" in name or "experts" in name for name in theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def test_targets_by_rule_name_and_expression(model):
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    mlp = {f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}
    assert adapted(model()) == attention
    assert adapted(model(targets="linear")) == attention | mlp
    assert adapted(model(targets=["q_proj", "mlp.up_proj"])) == {
        name for name in attention | mlp if name.endswith(("q_proj", "up_proj"))
    }
    assert adapted(model(targets=["lm_head"])) == {"lm_head"}
    assert adapted(model(targets=r"model\.layers\.1\..*[qk]_proj")) == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qk"
    }


@pytest.mark.parametrize("targets", [["q_proj", "w_q"], r".*\.w_q"])
def test_targets_that_match_nothing_name_what_there_is(model, targets):
    names = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(RecipeError, match=rf"w_q matches no linear layer of LlamaForCausalLM.*{names}"):
        model(targets=targets)


def test_an_adapter_for_a_tied_head_is_refused(tmp_path, arguments, refused):
    error = refused(*arguments(tmp_path / "run", "lora.targets=[lm_head]", tied=True))
    assert "shares its weight with the embedding (tied)" in error


def test_adapters_that_do_not_fit_the_model_are_refused(trained, pretrained, tmp_path):
    final = tmp_path / "final"
    shutil.copytree(trained["untied"].path / "final", final)
    tensors = load_file(final / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def refusal(changed):
        save_file(changed, final / "adapter_model.safetensors")
        with pytest.raises(ModelError) as error:
            load_adapters(final)
        return str(error.value)

    rest = {name: tensor for name, tensor in tensors.items() if name != gone}
    assert "the folder lacks model.layers.1.mlp.up_proj.lora_B.weight" in refusal(rest)
    other = "base_model.model.model.layers.0.self_attn.sparsek_scorer.weight"
    assert "the model has no model.layers.0.self_attn.sparsek_scorer" in refusal({**tensors, other: torch.ones(2)})
    assert "lora_B.weight is [3, 4] in the folder and [64, 4] in the model" in refusal(
        {**tensors, gone: torch.ones(3, 4)}
    )
    (final / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot read the adapters"):
        load_adapters(final)
    with pytest.raises(ModelError, match=r"the base model of the adapters .* there is no such folder.* give base="):
        load_adapters(trained["untied"].path / "final", base="/not/there")
    # Another base of the same family: two layers of the tensors find no place.
    base = AutoModelForCausalLM.from_pretrained(pretrained / "untied")
    del base.model.layers[1]
    base.config.num_hidden_layers = 1
    sparsetrain.sparsify(base, {"method": "full"})
    with pytest.raises(ModelError, match=r"has no model\.layers\.1"):
        read_adapters(base, trained["untied"].path / "final")


def test_the_base_is_found_where_it_has_moved(trained, pretrained, tmp_path):
    final = trained["untied"].path / "final"
    shutil.copytree(pretrained / "untied", tmp_path / "moved")
    assert torch.equal(logits(load_adapters(final, base=str(tmp_path / "moved"))), logits(load_adapters(final)))
    assert load_adapters(final, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {"model_type": "qwen3", "head_dim": 8}])
def test_adapters_are_refused_on_another_base_whose_shapes_fit(attention_adapters, pretrained, tmp_path, change):
    other = tmp_path / "other"
    fields = json.loads((pretrained / "untied/config.json").read_text())
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same = {name: fields[name] for name in (*shape, "num_key_value_heads", "model_type", "tie_word_embeddings")}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**same, **change})).save_pretrained(other)
    name, value = next(iter(change.items()))
    with pytest.raises(ModelError) as error:
        sparsetrain.load(attention_adapters, base=other)
    assert f"{other} is not the model that the adapters were trained on" in str(error.value)
    assert f"{name} is {value!r} instead of {fields[name]!r}" in str(error.value)

    # A folder of before has no record of its base, and the tensors fit.
    record = attention_adapters / "sparsetrain.json"
    about = {**json.loads(record.read_text()), "format": 1}
    del about["base_config"]
    record.write_text(json.dumps(about))
    sparsetrain.load(attention_adapters, base=other)


def test_the_dtype_of_adapters_is_given_as_for_a_model(attention_adapters):
    given = logits(load_adapters(attention_adapters))
    assert torch.equal(logits(sparsetrain.load(attention_adapters, dtype="auto")), given)
    exact = logits(sparsetrain.load(attention_adapters, dtype=torch.float64))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), given, rtol=0, atol=1e-4)
    with pytest.raises(
        ModelError, match=r"dtype=torch\.int8: the base model of adapters loads in auto, float64, float32"
    ):
        sparsetrain.load(attention_adapters, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([1], r"sparsetrain\.json holds \[1\]; a JSON object is expected"),
        ({"format": "one"}, "the record of the attention method in .*sparsetrain.json is damaged"),
        ({"format": 99}, "this version .* reads format 2: upgrade sparsetrain"),
        ({"attention": None}, "attention=None is not a mapping"),
        ({"attention": {"method": "powder"}}, "there is no 'powder'"),
        ({"model": None}, "sparsetrain.json does not say which model the adapters belong to"),
        ({"model": {"path": 7}}, "sparsetrain.json does not say which model the adapters belong to"),
        ({"model": {"weights": "llama"}}, "sparsetrain.json does not say which model the adapters belong to"),
    ],
)
def test_a_malformed_record_is_told(attention_adapters, change, said):
    record = attention_adapters / "sparsetrain.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change} if isinstance(change, dict) else change))
    with pytest.raises(ModelError, match=said):
        sparsetrain.load(attention_adapters)


@pytest.mark.parametrize("lost", ["base_config", "version", "attention.sinks", "model.dtype", "base_config.head_dim"])
def test_a_field_that_a_record_has_lost_does_not_take_its_default(attention_adapters, lost):
    record = attention_adapters / "sparsetrain.json"
    about = json.loads(record.read_text())
    *outer, name = lost.split(".")
    place = about[outer[0]] if outer else about
    for given in (name, f"{name}x"):
        value = place.pop(name, None)
        if given != name:
            place[given] = value
        record.write_text(json.dumps(about))
        with pytest.raises(
            ModelError, match=rf"sparsetrain\.json.*(the field {name} is missing|unknown field '{name}x'|{name}x)"
        ):
            sparsetrain.load(attention_adapters)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, which reads it first
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; sparsetrain loads only LORA"),
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA'; sparsetrain loads only LORA"),
        ({"peft_type": "NONE"}, "peft_type='NONE'; sparsetrain loads only LORA"),
        (
            {"use_rslor": True},
            r"use_rslor=True is unknown to peft .*; did you mean use_rslora.*upgrade peft, or remove",
        ),
        ({"use_what_comes_next": True}, r"use_what_comes_next=True is unknown to peft .*written by peft 0\."),
        ({"r": "four"}, r"adapter_config\.json: r='four': Input should be a valid integer"),
        ({"target_modules": 5}, r"adapter_config\.json: target_modules=5: Input should be a valid array"),
        ([], r"adapter_config\.json holds \[\]; a JSON object is expected"),
    ],
)
def test_an_adapter_config_that_is_not_ours_is_told(attention_adapters, change, said):
    file = attention_adapters / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change} if isinstance(change, dict) else change))
    with pytest.raises(ModelError, match=said):
        sparsetrain.load(attention_adapters)


def test_fields_of_other_versions_of_peft_that_change_nothing_pass(attention_adapters):
    file = attention_adapters / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "merge_weights": False, "next_config": None}))
    sparsetrain.load(attention_adapters)


def test_the_base_is_recorded_by_its_absolute_path(tmp_path, arguments, pretrained, monkeypatch):
    monkeypatch.chdir(pretrained)
    assert main([*arguments(tmp_path / "run"), "model.path=untied"]) == 0
    config = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pretrained / "untied")


def test_load_and_eval_take_a_folder_of_adapters(trained, tmp_path, monkeypatch):
    final = trained["untied"].path / "final"
    expected = logits(load_adapters(final))
    assert torch.equal(logits(sparsetrain.load(final)), expected)
    assert sparsetrain.load(final, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(
        ModelError, match=r"final holds adapters, .*not accept device_map; they accept base, dtype, trust"
    ):
        sparsetrain.load(final, device_map="cpu")

    text = "{path: python-stdlib, split: validation}"
    measure = f"eval={{tasks: [{{task: perplexity, lengths: [64], tokens: 256, source: {text}}}]}}"
    monkeypatch.chdir(tmp_path)
    recipe = str(trained["untied"].path / "recipe.yaml")
    assert main(["eval", str(final), recipe, measure, "--output", "result.json"]) == 0
    (adapted,) = json.loads((tmp_path / "result.json").read_text())["rows"].values()
    merge_adapters(sparsetrain.load(final)).save_pretrained(tmp_path / "merged")
    for file in final.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "merged")
    assert main(["eval", "merged", recipe, measure, "--output", "merged.json"]) == 0
    (merged,) = json.loads((tmp_path / "merged.json").read_text())["rows"].values()
    adapted, merged = (row["tasks"]["perplexity"]["perplexity"] for row in (adapted, merged))
    assert adapted == {length: pytest.approx(value, rel=1e-4) for length, value in merged.items()}


def test_save_refuses_adapters_that_an_ordinary_folder_cannot_hold(model, tmp_path):
    adapters = model()
    with pytest.raises(ModelError, match=r"has LoRA adapters.*merge_adapters"):
        sparsetrain.save(adapters, tmp_path)
    assert not list(tmp_path.iterdir())
    sparsetrain.save(merge_adapters(adapters), tmp_path)


def test_a_published_run_says_what_it_is(trained, tmp_path, refused):
    run = trained["untied"].path
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(logits(load_adapters(tmp_path / "out")), logits(load_adapters(run / "final")))
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n")
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["library_name"] == "peft"
    assert "lora" in about["tags"]
    assert "256 tokens: power attention" in card
    assert "train_embeddings: true" in card
    assert "exists already" in refused("export", str(run), str(tmp_path / "out"))
    assert "no recipe.yaml" in refused("export", str(tmp_path), str(tmp_path / "other"))


def test_quantised_weights_are_refused_where_nothing_computes_with_them(tmp_path, arguments, refused):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    error = refused(*arguments(tmp_path / "run", "lora.quantize_base=4bit"))
    assert "lora.quantize_base=4bit: bitsandbytes computes on CUDA devices" in error
