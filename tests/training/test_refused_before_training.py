"""Mistakes that would only show in the middle of a run, or after it, end it before its first step."""

from __future__ import annotations

import pytest
import yaml


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{zero_optimization: {stag: 3}}", "DeepSpeedZeroConfig): stag=3"),
        ("{zero_optimization: {reduce_bucket_size: lots}}", "reduce_bucket_size='lots'"),
        ("{tensorboard: 3}", "tensorboard=3"),
        ("{amp: {enabled: true}}", "AMP"),
    ],
)
def test_a_deepspeed_json_that_deepspeed_refuses(tmp_path, tiny, refused, config, said):
    error = refused("run", str(tiny), f"deepspeed.config={config}", "--output", str(tmp_path / "run"))
    assert error.startswith("deepspeed.config is refused by DeepSpeed")
    assert said in error


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("passkey={lengths: [8]}", "eval.tasks.passkey.lengths: a retrieval document of 8 tokens has no room"),
        ("perplexity={lengths: [64], tokens: 64, source: {path: nowhere.txt}}", "nowhere.txt does not exist"),
    ],
)
@pytest.mark.parametrize("when", ["eval.at_end=true", "eval.every=2"])
def test_an_evaluation_that_cannot_be_made(tmp_path, tiny, refused, run_folder, section, said, when):
    run = run_folder(tmp_path / "run")
    assert said in refused("run", str(tiny), f"eval.tasks.{section}", when, "--output", str(run.path))
    assert not run.lines


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.0},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1, "hidden_size": 32, "dropout": 0.0}
    | {"num_attention_heads": 4, "max_position_embeddings": 256, "attention_dropout": 0.0},
}


@pytest.mark.parametrize("command", ["run", "recipe validate", "plan"])
@pytest.mark.parametrize(("family", "table"), [("gpt2", "transformer.wpe"), ("opt", "model.decoder.embed_positions")])
def test_an_evaluation_beyond_learned_positions(tmp_path, tiny, refused, family, table, command):
    recipe = yaml.safe_load(tiny.read_text())
    recipe["model"]["architecture"] = {"model_type": family, "vocab_size": 384, **TABLES[family]}
    recipe["attention"] = {"method": "full"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [*command.split(), str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'run'}"]
    error = refused(*arguments, "eval.at_end=true", "eval.tasks.passkey={lengths: [256, 512]}")
    assert f"eval.tasks.passkey.lengths: 512 tokens exceed the 256 learned positions of the model ({table})" in error
    error = refused(*arguments, "sequence.length=512")
    assert f"exceed the 256 learned positions of the model ({table})" in error or "rows end at 256" in error
