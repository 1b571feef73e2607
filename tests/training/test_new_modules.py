"""The modules that a method adds: trained alone or beside adapters, at a rate of their own, saved and loaded again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsetrain.cli import main
from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Method
from sparsetrain.methods.static import StaticMethod
from sparsetrain.modeling import load, load_model
from sparsetrain.modeling.adapter_folder import load_adapters, read_adapters
from sparsetrain.training.checkpoints import read_weights
from sparsetrain.training.distributed import build
from sparsetrain.training.distributed.optimizers import build_optimizer

SPARSEK = "attention={method: sparsek, topk: 8, window: 16, sinks: 2}"
SCORERS = {f"model.layers.{layer}.self_attn.sparsek_scorer.{name}" for layer in (0, 1) for name in ("weight", "gain")}


@pytest.fixture(scope="module")
def arguments(tiny, pretrained):
    """``arguments(output, *overrides)``: the command that trains a pretrained model with SparseK for two steps."""

    def command(output, *overrides):
        model = json.dumps({"path": str(pretrained / "tied"), "dtype": "float32"})
        short = ["train.steps=2", "train.global_batch_sequences=2"]
        return ["run", str(tiny), f"model={model}", SPARSEK, *short, *overrides, "--output", str(output)]

    return command


@pytest.fixture(scope="module")
def scorers(arguments, shared, ranks_of, run_folder):
    """Scorers trained alone by two ranks under ZeRO-3, resumed once, and by one rank without ZeRO."""

    def make(folder):
        own = ["train.parameters=new_modules", "train.new_modules_lr=0.02", "train.warmup=0"]
        alone = arguments(folder / "alone", *own, "deepspeed.stage=0")
        assert main(alone) == 0
        overrides = [*own, "train.activation_checkpointing=layer", "deepspeed.stage=3"]
        sharded = arguments(folder / "sharded", *overrides, "checkpoint.every=1")
        ranks_of([sharded], folder / "log", 2).wait()
        (folder / "sharded/final").rename(folder / "first-final")
        shutil.rmtree(folder / "sharded/checkpoints/step-000002")
        ranks_of([[*sharded, "--resume"]], folder / "log", 2).wait()

    folder = shared("scorer-runs", make)
    return run_folder(folder / "alone"), run_folder(folder / "sharded"), folder / "first-final"


def generated(model):
    torch.manual_seed(0)
    tokens = torch.randint(5, 300, (1, 60))
    return model.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)


def test_scorers_alone_under_zero_3_train_as_without(scorers):
    alone, sharded, _ = scorers
    assert sharded.values("loss") == pytest.approx(alone.values("loss"), rel=2e-6)
    assert sharded.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-4)
    assert min(alone.values("grad_norm")) > 0
    for name in SCORERS:
        torch.testing.assert_close(sharded.weights[name], alone.weights[name], rtol=0, atol=1e-5)


def test_only_the_scorers_have_changed(scorers, pretrained):
    alone, _, _ = scorers
    before = load_file(pretrained / "tied/model.safetensors")
    assert alone.weights.keys() == before.keys() | SCORERS
    assert all(torch.equal(alone.weights[name], tensor) for name, tensor in before.items())


def test_a_resumed_scorer_run_ends_as_an_uninterrupted_one(scorers):
    _, sharded, first = scorers
    whole = load_file(first / "model.safetensors")
    assert all(torch.equal(sharded.weights[name], tensor) for name, tensor in whole.items())


def test_a_checkpoint_of_scorers_is_as_small_as_they_are(scorers):
    for run in scorers[:2]:
        weights = read_weights(run.path / "checkpoints/step-000002")
        assert weights.keys() == SCORERS


def test_trained_scorers_load_and_generate(scorers):
    alone, sharded, _ = scorers
    model = load(sharded.path / "final")
    assert all(torch.equal(model.state_dict()[name], sharded.weights[name]) for name in SCORERS)
    assert torch.equal(generated(model), generated(load(alone.path / "final")))


def test_an_adapter_carries_the_scorers_along(tmp_path, arguments, pretrained):
    assert main(arguments(tmp_path / "run", "lora={rank: 4}", "train.new_modules_lr=0.05")) == 0
    final = tmp_path / "run/final"
    tensors = load_file(final / "adapter_model.safetensors")
    there = {f"base_model.model.{name}" for name in SCORERS}
    assert {name for name in tensors if "lora_" not in name} == there
    model = load_adapters(final)
    for name in SCORERS:
        assert torch.equal(model.state_dict()[name], tensors[f"base_model.model.{name}"])
    assert generated(model).shape == (1, 80)

    dense, _ = load_model_of(pretrained, {"method": "full"})
    with pytest.raises(ModelError, match=r"has no model\.layers\.0\.self_attn\.sparsek_scorer"):
        read_adapters(dense, final)
    save_file({name: t for name, t in tensors.items() if name not in there}, final / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"the folder lacks model\.layers\.0\.self_attn\.sparsek_scorer\.gain"):
        load_adapters(final)


@pytest.mark.parametrize(
    ("scorer", "overrides"),
    [
        ("learned", ["train.parameters=new_modules", "deepspeed.stage=3", "train.activation_checkpointing=layer"]),
        ("frozen", ["lora={rank: 4}", "deepspeed.stage=2"]),
    ],
)
def test_scorers_fitted_to_attention_train_resume_and_load(tmp_path, arguments, run_folder, scorer, overrides):
    whole, resumed = run_folder(tmp_path / "whole"), run_folder(tmp_path / "resumed")
    attention = SPARSEK.replace("}", f", init: attention, scorer: {scorer}}}")
    text = "{path: python-stdlib, split: validation}"
    measure = f"eval={{tasks: [{{task: perplexity, lengths: [64], tokens: 256, source: {text}}}]}}"
    command = [attention, measure, *overrides, "checkpoint.every=1"]
    assert main(arguments(whole.path, *command)) == 0
    shutil.copytree(whole.path, resumed.path)
    shutil.rmtree(resumed.path / "checkpoints/step-000002")
    shutil.rmtree(resumed.path / "final")
    assert main([*arguments(resumed.path, *command), "--resume"]) == 0
    assert resumed.values("loss") == whole.values("loss")
    # The evaluation at the start, dense and sparse, came after the fit, and left the scorers as they were.
    labels = json.loads((whole.path / "evaluation.json").read_text())
    assert "sparsek, before" in labels
    assert "full attention, before" in labels

    first, second = (load(run.path / "final") for run in (whole, resumed))
    for name in SCORERS:
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
        assert first.state_dict()[name].std() > 1e-4 or name.endswith("gain")
    assert torch.equal(generated(first), generated(second))


def test_a_fit_without_a_document_long_enough_is_refused(tmp_path, arguments, refused):
    attention = SPARSEK.replace("}", ", init: attention}").replace("window: 16", "window: 250")
    assert "is long enough beyond attention.window=250" in refused(*arguments(tmp_path / "run", attention))


def load_model_of(pretrained, attention):
    from sparsetrain.recipe.schema import ModelSection

    return load_model(ModelSection(path=str(pretrained / "tied"), dtype="float32"), attention, seed=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_new_modules_learn_at_a_rate_of_their_own(tmp_path, arguments, run_folder, stage, monkeypatch):
    seen = []

    def initialize(*given):
        seen.append(engine_of(*given))
        return seen[0]

    engine_of = build.initialize
    monkeypatch.setattr(build, "initialize", initialize)
    run = run_folder(tmp_path / "run")
    overrides = ["lora={rank: 4}", "train.new_modules_lr=0.05", "train.warmup=0", "train.min_lr_ratio=0.5"]
    assert main(arguments(run.path, *overrides, f"deepspeed.stage={stage}")) == 0
    assert run.values("lr") == [1e-2, 5e-3]
    assert run.values("lr_new_modules") == [5e-2, 2.5e-2]
    rates = {group["peak_lr"]: group["lr"] for group in seen[0].optimizer.param_groups}
    assert rates == {1e-2: 5e-3, 5e-2: 2.5e-2}
    assert torch.nn.functional.linear is torch._C._nn.linear, "what DeepSpeed replaces is put back"


def test_the_rate_shown_is_the_one_that_something_is_trained_at(scorers):
    for run in scorers[:2]:
        assert run.values("lr") == run.values("lr_new_modules") == [0.02, 0.002]


def test_the_groups_hold_every_parameter_once(tiny_recipe, pretrained, world):
    model = json.dumps({"path": str(pretrained / "tied"), "dtype": "float32"})
    recipe = tiny_recipe(f"model={model}", SPARSEK, "train.new_modules_lr=0.05")
    loaded, _ = load_model(recipe.model, recipe.attention, seed=0)
    names = {id(parameter): name for name, parameter in loaded.named_parameters()}
    groups = build_optimizer(loaded, recipe, world.device).param_groups
    found = {
        (group["peak_lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in groups
    }
    assert found[0.05, 0.1] == {name for name in SCORERS if name.endswith("weight")}
    assert found[0.05, 0.0] == {name for name in SCORERS if name.endswith("gain")}
    assert all("proj" in name for name in found[0.01, 0.1])
    assert sorted(name for group in found.values() for name in group) == sorted(names.values())


def test_methods_are_told_the_step_and_watched_when_it_is_logged(tmp_path, tiny, run_folder, monkeypatch):
    told, watched = [], []

    def attend(self, *given, **options):
        watched.append(self.observing)
        return original(self, *given, **options)

    original = StaticMethod.attend
    monkeypatch.setattr(StaticMethod, "attend", attend)
    monkeypatch.setattr(StaticMethod, "begin_step", lambda self, step, steps: told.append((step, steps)))
    monkeypatch.setattr(StaticMethod, "observations", lambda self: {"power/calls": float(sum(watched))}, raising=False)
    run = run_folder(tmp_path / "run")
    overrides = ["train.steps=3", "train.log_every=2", "train.global_batch_sequences=2"]
    assert main(["run", str(tiny), *overrides, "--output", str(run.path)]) == 0
    assert told == [(0, 3), (1, 3), (2, 3)]
    # Two layers, two micro batches: the second and the last step are logged.
    assert [(line["step"], line["power/calls"]) for line in run.steps] == [(2, 4.0), (3, 8.0)]
    assert Method.observing is False


def test_sparsek_reports_what_it_selects(scorers):
    step = scorers[1].steps[-1]
    assert 0 < step["sparsek/kept_mass/layer_01"] <= 1
    assert {name.split("/")[1] for name in step if name.startswith("sparsek/")} >= {"support_size", "interior_size"}
