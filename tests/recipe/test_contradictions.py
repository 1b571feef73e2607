from __future__ import annotations

import json

import pytest

ARCHITECTURE = "{architecture: {model_type: llama, num_hidden_layers: 4}, tokenizer: t}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["attention.block=512"], "attention.block: a block of 512 tokens is longer than sequence.length=128"),
        (["train.global_batch_tokens=300"], "300 is not a whole number of rows of sequence.length=128; 256 or 384 is"),
        (["train.global_batch_tokens=100"], "100 is not a whole number of rows of sequence.length=128; 128 is"),
        (["train.global_batch_sequences=6", "train.micro_batch=4"], "6 rows is not a multiple of train.micro_batch=4"),
        (["train.warmup=31"], "31 steps of warmup in a run of train.steps=30"),
        (["train.warmup=1.5"], "train.warmup=1.5: 1 or more is a number of steps and must be whole"),
        (
            ["train.tokens=1000", "train.steps=3"],
            "train.steps and train.tokens are given; keep one and set the others to null",
        ),
        (["train.steps=null"], "give one of train.steps, train.epochs and train.tokens"),
        (
            ["train.global_batch_tokens=256", "train.global_batch_sequences=2"],
            "train.global_batch_sequences and train.global_batch_tokens are given",
        ),
        (
            ["train.steps=null", "train.epochs=2", "data.sources.0.streaming=true"],
            "data.sources.0 (corpus.jsonl) is streamed, so epochs have no length",
        ),
        (
            ["train.steps=null", "train.epochs=2", "data.sources.0={synthetic: passkey}"],
            "data.sources.0 (passkey) is generated without end",
        ),
        (
            ["data.sources.0={synthetic: passkey, lengths: [64, 256]}"],
            "data.sources.0.lengths: synthetic documents of 256 tokens do not fit sequence.length=128",
        ),
        (["data.sources.0={synthetic: passkey, streaming: true}"], "streaming=True has no effect here"),
        (
            ["data.sources.0={synthetic: passkey, keys: 3}"],
            "keys=3 has no effect here: it belongs to synthetic: multikey",
        ),
        (["data.sources.0.digits=3"], "digits=3 has no effect here: it belongs to synthetic: passkey and multikey"),
        (
            ["data.sources.0={synthetic: recall, digits: 3}"],
            "digits=3 has no effect here: it belongs to synthetic: passkey and multikey",
        ),
        (
            ["data.sources.0.form=chat", "data.sources.0.text_field=body"],
            "text_field=body has no effect here: it belongs to form: text",
        ),
        (["data.sources.0={weight: 2}"], "a source has either a path or a synthetic task; neither is given"),
        (
            ["data.sources.0={path: x, synthetic: passkey}"],
            "a source has either a path or a synthetic task; both is given",
        ),
        (["eval.every=10"], "every 10 steps nothing would be measured"),
        (["eval.tasks.perplexity={lengths: [512], source: {path: x}, tokens: 256}"], "256 tokens hold no window of"),
        (
            ["model.architecture={model_type: llama}", "model.path=some/model"],
            "model.path=some/model (pretrained) and model.architecture",
        ),
        (["model.path=null"], "give model.path (pretrained) or model.architecture"),
        (["model={architecture: {model_type: llama}}"], "model.tokenizer must say which tokenizer"),
        (["model={architecture: {hidden_size: 4}, tokenizer: t}"], "model.architecture needs model_type"),
        (["model={architecture: {model_type: 3}, tokenizer: t}"], "model.architecture needs model_type"),
        (
            [f"model={ARCHITECTURE}", "attention.dense_layers=[0, 4]"],
            "names layer 4, but the model has 4 layers (0 to 3)",
        ),
        ([f"model={ARCHITECTURE}", "attention.dense_layers=[-5]"], "names layer -5"),
        (
            [f"model={ARCHITECTURE}", "model.architecture.num_hidden_layers=0"],
            "model.architecture.num_hidden_layers: a model has at least one layer, not 0",
        ),
        (
            [f"model={ARCHITECTURE}", "model.config_overrides={num_hidden_layers: -1}"],
            "model.config_overrides.num_hidden_layers: a model has at least one layer, not -1",
        ),
        (["attention.dense_layers={count: 2, every: 7, first: 6}"], "reach beyond the group of every=7 layers"),
        ([f"model={ARCHITECTURE}", "attention.dense_layers=[0,1,2,3]"], "attention.method=power has no effect"),
        (["deepspeed.offload_parameters=cpu"], "deepspeed.offload_parameters needs deepspeed.stage: 3, not 2"),
        (["deepspeed.stage=0", "deepspeed.offload_optimizer=cpu"], "deepspeed.offload_optimizer needs deepspeed.stage"),
        (
            ["train.parameters=new_modules"],
            "train.parameters: parameters=new_modules is about modules that the attention method adds, and "
            "attention.method=power adds none",
        ),
        (["train.new_modules_lr=1"], "attention.method=power adds none; set it to null"),
        (
            ["attention={method: sparsek, scorer: frozen}", "train.parameters=new_modules"],
            "train.parameters: new_modules trains only the scorers, but with attention.scorer=frozen they are not",
        ),
        (
            ["attention={method: sparsek}", "train.parameters=new_modules", "lora={}"],
            "new_modules freezes everything else, so lora's adapters would never change",
        ),
        ([f"model={ARCHITECTURE}", "lora={}"], "lora: freezes the model, but model.architecture starts it from random"),
        (
            [f"model={ARCHITECTURE}", "attention={method: sparsek}", "train.parameters=new_modules"],
            "train.parameters: freezes the model, but model.architecture",
        ),
        (["lora={quantize_base: 4bit}", "deepspeed.stage=3"], "4bit weights cannot be sharded by deepspeed.stage=3"),
        (["lora={targets: q_proj}"], "targets='q_proj' is not a rule; choose attention, linear, a list of names"),
        (["lora={targets: all-linear}"], "targets='all-linear' is a keyword of peft; the equivalent here is linear"),
        (["lora={targets: '.*[q'}"], "targets='.*[q' is not a regular expression"),
        (["lora={dropout: 1}"], "lora.dropout: expected a number below 1"),
    ],
)
def test_contradictions_name_both_sides(refuse, minimal, overrides, expected):
    message = refuse(minimal, *overrides)
    assert expected in message
    assert "Value error" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["sequence.length=100"],
        ["attention.block=128"],
        ["train.warmup=30"],
        ["train.warmup=0.5"],
        ["train.global_batch_tokens=256"],
        ["train.steps=null", "train.tokens=1"],
        [f"model={ARCHITECTURE}", "attention.dense_layers=[0, -1]"],
        ["attention.method=full", f"model={ARCHITECTURE}", "attention.dense_layers=[0,1,2,3]"],
        ["attention={method: sparsek}", "train.parameters=new_modules", "train.new_modules_lr=1"],
        ["lora={targets: linear, quantize_base: 8bit}"],
        ["lora={targets: '.*layers.[0-7].*_proj'}", "deepspeed.stage=3"],
    ],
)
def test_what_only_looks_like_a_contradiction_is_accepted(load, minimal, overrides):
    load(minimal, *overrides)


def test_layers_are_checked_against_a_local_model_too(refuse, minimal, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    message = refuse(minimal, f"model.path={tmp_path}", "attention.dense_layers=[2]")
    assert "names layer 2, but the model has 2 layers" in message


def test_settings_without_effect_are_noted(load, minimal):
    notes = load(minimal, "checkpoint.every=100", "eval.every=50", "eval.tasks.passkey.lengths=[128]").notes
    assert "checkpoint.every=100 has no effect in a run of 30 steps" in notes
    assert "eval.every=50 has no effect in a run of 30 steps" in notes
    (note,) = load(minimal, "attention.block=32").notes
    assert "sequence.length=128 is 4 blocks of 32, which the pattern covers: every row is trained densely" in note
