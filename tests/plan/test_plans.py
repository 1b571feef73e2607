"""Whole plans: what grows and what shrinks, suggestions that really fit, every shipped recipe, and the command."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.cli import main
from sparsetrain.errors import RecipeError
from sparsetrain.plan.command import make_plan, planned_options, shipped_page
from sparsetrain.plan.measured import CONTEXT
from sparsetrain.plan.memory import estimate_memory
from sparsetrain.recipe import load_recipe, loading, shipped_recipes

GIB = 2**30
LARGE = ["qwen3-8b-power-128k", "train.offload_activations=false"]


def needed(name, *overrides, gpus=8, **options):
    return make_plan(name, overrides, gpus=gpus, **options).memory.needed


def test_longer_rows_and_more_of_them_need_more_and_more_ranks_less():
    lengths = [needed(*LARGE, f"sequence.length={length}") for length in (16384, 32768, 65536, 131072)]
    assert lengths == sorted(lengths)
    assert needed("mistral-7b-power-32k", "train.micro_batch=2") > needed("mistral-7b-power-32k")
    ranks = [needed("mistral-7b-power-32k", gpus=gpus) for gpus in (1, 2, 4, 8)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 3 * ranks[-1]


def test_each_stage_needs_no_more_than_the_one_before():
    stages = [needed("mistral-7b-power-32k", f"deepspeed.stage={stage}") for stage in range(4)]
    assert stages == sorted(stages, reverse=True)
    assert len(set(stages)) == 4


def test_ranks_that_share_a_sequence_need_less():
    shared = [needed(*LARGE, f"sequence.parallel={size}") for size in (1, 2, 4, 8)]
    assert shared == sorted(shared, reverse=True)


@pytest.mark.parametrize(
    ("name", "overrides", "options"),
    [
        (*LARGE[:1], LARGE[1:], {"gpus": 8}),
        ("mistral-7b-power-32k", [], {"gpus": 1}),
        ("llama-3.1-8b-power-64k", [], {"gpus": 8, "memory": "24GB"}),
        ("qwen3-8b-power-lora-64k", ["train.activation_checkpointing=none", "train.loss_chunk=null"], {"gpus": 8}),
        ("qwen3-0.6b-power-32k", ["train.micro_batch=4"], {"gpus": 1, "memory": "24GB"}),
        # One override of a change can be spared, the others of it cannot.
        ("qwen3-8b-power-lora-64k", [], {"gpus": 8, "memory": "12GB"}),
        ("qwen3-8b-sparsek-lora-64k", [], {"gpus": 8, "memory": "12GB"}),
        ("mistral-7b-sparsek-full-64k", [], {"gpus": 8, "memory": "12GB"}),
        # The recipe refuses ZeRO-3.
        (
            "llama-3.1-8b-power-lora-64k",
            ["lora.quantize_base=4bit", "deepspeed.stage=2"],
            {"gpus": 8, "memory": "16GB"},
        ),
        ("llama-3.1-8b-power-lora-64k", ["lora.dora=true", "deepspeed.stage=2"], {"gpus": 8, "memory": "40GB"}),
    ],
)
def test_what_is_suggested_fits_and_is_needed(name, overrides, options):
    plan = make_plan(name, overrides, **options)
    assert not plan.fits
    combination = plan.suggestion.combination
    assert combination
    fitting = make_plan(name, [*overrides, *combination], **options)
    assert fitting.fits
    assert fitting.memory.needed == pytest.approx(plan.suggestion.needed)
    for spared in combination:
        rest = [override for override in combination if override != spared]
        # The others may make no recipe without it.
        with contextlib.suppress(RecipeError):
            assert not make_plan(name, [*overrides, *rest], **options).fits
    assert sum(change.saves for change in plan.suggestion.changes) > plan.memory.needed - plan.capacity


def test_nothing_is_suggested_that_the_recipe_refuses(monkeypatch):
    options = {"gpus": 8, "memory": "40GB"}
    overrides = ["llama-3.1-8b-power-lora-64k", ["deepspeed.stage=2"]]
    assert "deepspeed.stage=3" in make_plan(*overrides, **options).suggestion.combination

    def refuse(recipe):
        return [(("deepspeed", "stage"), "no")] if recipe.deepspeed.stage == 3 else []

    monkeypatch.setattr(loading, "contradictions", refuse)
    suggestion = make_plan(*overrides, **options).suggestion
    named = {override for change in suggestion.changes for override in change.overrides}
    assert suggestion.combination
    assert "deepspeed.stage=3" not in named


def test_evaluations_are_said_not_to_be_in_the_time(capsys):
    eval_of = ["eval.every=100", "eval.rows=[{attention: dense}]", "eval.at_start=false"]
    assert main(["plan", "qwen3-8b-power-lora-64k", "train.steps=1000", *eval_of]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "- Evaluations are not in these times: 9 during it, 2 after it; each of perplexity, passkey." in said
    assert main(["plan", "qwen3-8b-power-lora-64k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_timed"] == ["perplexity", "passkey"]


def test_where_nothing_fits_it_says_so(capsys):
    assert main(["plan", "qwen3-32b-power-32k", "--gpus", "8", "--memory", "2GB"]) == 0
    said = capsys.readouterr().out
    assert "use more or larger GPUs" in said
    assert re.search(r"The run takes [\d,]+ steps: \d+\.\d (minutes|hours|days), without", " ".join(said.split()))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_fits_the_gpus_that_its_comment_names(name):
    options = planned_options(shipped_recipes()[name])
    assert options or load_recipe(name).recipe.model.path == "sparsetrain:tiny" or name == "pretrain-tiny"
    plan = make_plan(name, gpus=int(options.get("gpus", "1")), device=options.get("device", "h100"))
    assert plan.fits
    assert 0 < plan.time.seconds <= plan.dense_time.seconds
    parts = {name for phase in plan.memory.phases for name, size in phase.parts.items() if size < 0}
    assert not parts


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_command_in_a_recipes_comment_is_valid_and_fits_the_gpus_it_was_planned_for(name):
    file = shipped_recipes()[name]
    options = planned_options(file)
    commands = []
    for line in file.read_text().splitlines():
        words = shlex.split(line, comments=False) if line.startswith("#   ") else []
        if name in words and ("launch/train.py" in words or words[2:3] == ["run"]):
            given = [word for word in words[words.index(name) + 1 :] if "=" in word]
            commands.append(given)
            gpus = words[words.index("--num_gpus") + 1] if "--num_gpus" in words else options.get("gpus", "1")
            assert make_plan(name, given, gpus=int(gpus), device=options.get("device", "h100")).fits, given
    assert commands


def test_the_page_of_plans_is_what_the_command_writes():
    page = Path(__file__).parents[2] / "docs" / "plans.md"
    assert page.read_text() == shipped_page(), "run: sparsetrain plan --all --markdown > docs/plans.md"


def test_measured_peaks_and_times_are_met():
    """`sparsetrain bench step` on one H200: Llama-3.2-1B's shape without an optimizer (docs/performance.md)."""
    for attention, length, ms, gib in [
        (["attention.method=full"], 32768, 1494, 11.3),
        (["attention.dense_layers=[]"], 32768, 874, 11.3),
        (["attention.method=full"], 131072, 14699, 28.7),
        (["attention.dense_layers=[]"], 131072, 3599, 29.2),
    ]:
        given = [
            f"sequence.length={length}",
            f"train.global_batch_tokens={length}",
            "deepspeed.stage=0",
            *attention,
        ]
        plan = make_plan("llama-3.2-1b-power-32k", given, device="h200")
        phases = [phase for phase in plan.memory.phases if phase.name != "step"]
        peak = max(phase.total - phase.parts.get("optimizer", 0.0) for phase in phases) / GIB
        assert peak == pytest.approx(gib, rel=0.15)
        assert 1e3 * (plan.time.seconds - plan.time.optimizer) == pytest.approx(ms, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "seconds", "gib"),
    [
        (["train.mlp_chunk=16384"], 13.40, 70.1),
        ([], 11.39, 76.3),
        (["train.mlp_chunk=16384", "train.offload_activations=true"], 13.48, 36.1),
        (["train.mlp_chunk=16384", "train.offload_activations=true", "sequence.length=262144"], 27.37, 46.5),
        # Two GPUs of ZeRO-2 with adapters on the attention alone.
        (["sequence.parallel=2", "lora.train_embeddings=false", "lora.train_norms=false"], 6.53, 42.8),
    ],
)
def test_measured_steps_of_long_rows_are_met(settings, seconds, gib):
    """`sparsetrain bench step` on H200s with Liger: Qwen3-8B's shape, one row (docs/million-tokens.md)."""
    given = ["train.global_batch_tokens=null", "train.global_batch_sequences=1", "deepspeed.stage=2"]
    given += ["sequence.length=131072", "sequence.parallel=1", *settings]
    ranks = 2 if "sequence.parallel=2" in settings else 1
    plan = make_plan("qwen3-8b-power-lora-1m", given, gpus=ranks, device="h200", liger=True)
    assert plan.time.seconds == pytest.approx(seconds, rel=0.1)
    assert plan.memory.peak.total / GIB == pytest.approx(gib, rel=0.1)
    offloaded = plan.setting.recipe.train.offload_activations
    assert plan.memory.host == (36 * 4096 * 2 * plan.setting.tokens if offloaded else 0)


def test_the_command_needs_neither_torch_nor_a_second():
    code = "import sys; from sparsetrain.cli import main; main(['plan', 'qwen3-8b-power-128k', '--gpus', '8']); "
    code += "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "It fits" in result.stdout
    assert "dense" in result.stdout


def test_json_holds_the_phases_and_the_need(capsys):
    assert main(["plan", "quickstart", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    peak = found["phases"][found["peak_phase"]]
    assert found["needed_bytes"] == pytest.approx(peak["total"] + CONTEXT)
    assert peak["total"] == pytest.approx(sum(size for name, size in peak.items() if name != "total"))
    assert found["fits"] is True
    assert found["combination"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "name a recipe"),
        (["plan", "quickstart", "--device", "tpu"], "--device tpu"),
        (["plan", "quickstart", "--memory", "lots"], "--memory lots"),
        (["plan", "quickstart", "--json", "--markdown"], "give one of them"),
        (["plan", "--all"], "--markdown"),
        (["plan", "quickstart", "--config", "/nowhere.json"], "cannot be read"),
        (["plan", "quickstart", "lora={targets: [q_proj, nope]}"], "lora.targets: nope matches no linear layer"),
        (["plan", "qwen3-0.6b-power-32k", "--gpus", "3"], "global batch"),
        (["plan", "qwen3-8b-power-lora-64k", "sequence.parallel=3", "--gpus", "3"], "sequence"),
    ],
)
def test_mistakes_are_explained(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_model_that_chooses_key_tokens_is_counted(capsys):
    tasks = "eval.tasks=[{task: key_tokens, lengths: [8192], source: {path: python-stdlib}, key_tokens_from: %s}]"
    arguments = ["plan", "qwen3-0.6b-power-32k", "--gpus", "1"]
    assert main([*arguments, tasks % "Qwen/Qwen3-32B", "--memory", "70GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in said
    assert "eval.tasks.key_tokens.key_tokens_from=Qwen/Qwen3-32B is held whole on each GPU" in said
    assert ": 61.0 GiB. Null has the model itself choose." in said  # 32.8 billion elements of two bytes
    assert "Append: eval.tasks.key_tokens.key_tokens_from=null" in said
    assert main([*arguments, tasks % "some/where", "--json"]) == 0
    assert "evaluation" not in json.loads(capsys.readouterr().out)["phases"]
    assert main([*arguments, tasks % "some/where"]) == 0
    assert "its size is not known here and not counted" in " ".join(capsys.readouterr().out.split())


def test_memory_of_a_plan_is_that_of_its_setting():
    plan = make_plan("mistral-7b-power-32k", gpus=8)
    assert plan.memory == estimate_memory(plan.setting)


@pytest.mark.parametrize("memory", [f"{'9' * 400}GB", "1e3", "0", "0.0001GB", "200000GB", "-1"])
def test_a_memory_that_no_gpu_has_is_refused(memory, capsys):
    assert main(["plan", "qwen3-8b-power-128k", "--gpus", "8", f"--memory={memory}"]) == 2
    assert f"--memory {memory:.60}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["recipe", "validate"]])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nonsense=1", "model.config_overrides.nonsense: Qwen3Config has no such field"),
        ("model_type=llama", "model.config_overrides.model_type cannot be set here"),
        ("num_attention_heads=7", "num_attention_heads"),
        ("rope_parameters.factr=4", "'factr' is not a parameter of rotary positions"),
        ("rope_theta=5e6", None),
    ],
)
def test_overrides_of_a_public_model_are_checked(command, override, said, capsys):
    code = main([*command, "qwen3-8b-power-128k", f"model.config_overrides.{override}"])
    assert code == (0 if said is None else 2)
    assert said is None or said in capsys.readouterr().err
