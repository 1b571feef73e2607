"""Mistakes that would only show in the middle of a run, or after it, end it before its first step."""

from __future__ import annotations

import pytest


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
