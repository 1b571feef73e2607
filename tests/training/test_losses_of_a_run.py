"""What a run says of the loss on text: of the same tokens in every evaluation, and beside full attention."""

from __future__ import annotations

import json

import pytest

from sparsetrain.cli import main


def test_every_evaluation_of_a_run_measures_the_tokens_that_full_attention_chose(tmp_path, tiny, run_folder, capsys):
    run = run_folder(tmp_path / "run")
    source = "source: {path: python-stdlib, split: validation}, tokens: 400"
    tasks = (
        f"[{{task: key_tokens, lengths: [128], short: 32, stride: 16, alpha: 0.0, beta: -9.0, {source}}}, "
        f"{{task: perplexity, lengths: [128], stride: 64, {source}}}]"
    )
    settings = [f"eval={{every: 6, at_start: true, at_end: true, tasks: {tasks}}}", "checkpoint.keep_best=key_tokens"]
    assert main(["run", str(tiny), *settings, "--output", str(run.path)]) == 0
    results = json.loads((run.path / "evaluation.json").read_text())
    first, *others = (result["tasks"]["key_tokens"] for result in results.values())
    assert next(iter(results)) == "full attention, before"
    assert first["chosen_by"] == "itself"
    assert {each["chosen_by"] for each in others} == {"the first row"}
    assert {each["key"]["128"]["tokens"] for each in (first, *others)} == {first["key"]["128"]["tokens"]}

    report = (run.path / "report.md").read_text()
    printed = capsys.readouterr().out
    for title in (
        "Difference from full attention, before in nats a token",
        "Loss by position in windows of 128 tokens",
    ):
        assert title in report
        assert title in printed
    assert "## Key-token perplexity (LongPPL) by context length" in report
    logged = {name for line in run.lines for name in line if name.startswith("eval/")}
    assert {"eval/key_tokens/128", "eval/key_tokens/128/share", "eval/perplexity/trailing_loss"} <= logged
    assert {"eval/perplexity/128", "eval/perplexity/position/64"} <= logged
    assert (run.path / "perplexity.png").is_file()

    command = ["eval", str(run.path), "--tasks", "key_tokens", "--attention", "dense", "--attention", "trained"]
    command.append(f"eval.tasks.key_tokens.key_tokens_from={run.path / 'final'}")
    assert main([*command, "--output", str(tmp_path / "result.json")]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"].values()
    assert [row["tasks"]["key_tokens"]["chosen_by"] for row in rows] == [str(run.path / "final"), "the first row"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_norms_of_parts_add_up_to_that_of_the_gradient(tmp_path, tiny, run_folder, stage):
    run = run_folder(tmp_path / "run")
    overrides = ["train.gradient_norms=true", "train.steps=2", f"deepspeed.stage={stage}", "checkpoint.export=false"]
    overrides += ["model.dtype=bfloat16"] if stage == 1 else []
    assert main(["run", str(tiny), *overrides, "--output", str(run.path)]) == 0
    for step in run.steps:
        parts = {name: value for name, value in step.items() if name.startswith("grad_norm/")}
        assert parts.keys() == {
            f"grad_norm/{part}"
            for part in (
                *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
                *("embed_tokens", "norm", "lm_head"),
            )
        }
        assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-5)
        assert step["system/process_memory_gb"] > 0.1
