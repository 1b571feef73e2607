"""A mistake in what a run is given ends it with exit code 2 and one readable message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsetrain.cli import main
from sparsetrain.training.output.tracking import Tracker
from sparsetrain.training.step import Stepper

LOCKING = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(300)
"""


@pytest.fixture
def finished(tmp_path, stages):
    """A copy of a finished run."""
    folder = tmp_path / "finished"
    shutil.copytree(stages(1)[2].path, folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tiny):
    """A pretrained folder of the tiny model, made by transformers."""
    folder = tmp_path / "pretrained"
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=384, num_key_value_heads=2, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.parent / "tokenizer").save_pretrained(folder)
    return folder


def from_folder(folder):
    """Overrides that train a pretrained folder in place of the random architecture."""
    return [f"model.path={folder}", "model.architecture=null", "model.tokenizer=null"]


def test_a_pretrained_folder_trains(tmp_path, tiny, checkpoint, run_folder):
    """The folder that the next tests break is a good one."""
    run = run_folder(tmp_path / "run")
    assert main(["run", str(tiny), *from_folder(checkpoint), "train.steps=2", "--output", str(run.path)]) == 0
    assert len(run.steps) == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.architecture.vocab_size=300"], "token ids but the model's embedding only 300 rows"),
        (["attention.dense_layers=[2]"], "names layer 2, but the model has 2 layers (0 to 1)"),
        (["attention.block=512"], "a block of 512 tokens is longer than sequence.length=256"),
        (["data.sources.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.sources.0.text_field=body"], "form text needs a column 'body'; it has 'text'"),
        (["train.lr=-1"], "train.lr"),
        (["train.learningrate=1"], "train.learningrate"),
        (["sequence.length=0"], "sequence.length"),
        (["deepspeed.config={train_batch_size: 32}"], "train_batch_size is 32 there, but the recipe makes it 4"),
        (["deepspeed.config={zero_optimisation: {stage: 2}}"], "did you mean zero_optimization?"),
        (["deepspeed.config=nowhere.json"], "deepspeed.config: nowhere.json: cannot be read"),
        (["deepspeed.offload_optimizer=cpu"], "this machine has none"),
        (["model.architecture.attention_dropout=0.1"], "attention_dropout=0.1: attention dropout is not supported"),
        (["deepspeed.config={prescale_gradients: true}"], "deepspeed.config is refused by DeepSpeed"),
        (["deepspeed.stage=true"], "must be a number, not true"),
        (["deepspeed.timeout=1e300"], "deepspeed.timeout"),
        (["deepspeed.timeout=1e-320"], "deepspeed.timeout"),
        (["wandb.project=team/project"], "wandb.project"),
        (["wandb.tags=[" + 65 * "x" + "]"], "wandb.tags"),
        (["model.path=/nowhere/model", "model.architecture=null"], "/nowhere/model"),
        (["model.tokenizer=/nowhere/tokenizer"], "/nowhere/tokenizer"),
        (["train.micro_batch=3"], "is not a multiple of train.micro_batch=3"),
        (["version=99"], "schema version 99"),
    ],
)
def test_a_recipe_that_cannot_be_run(tmp_path, tiny, refused, monkeypatch, overrides, said):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available() and "offload" in overrides[0]:
        pytest.skip("offload is allowed with a GPU")
    assert said in refused("run", str(tiny), *overrides, "--output", str(tmp_path / "run"))


@pytest.mark.parametrize("text", ["", "\n", '{"text": ""}\n'])
def test_an_empty_dataset(tmp_path, tiny, refused, text):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(text)
    error = refused("run", str(tiny), f"data.sources.0.path={empty}", "--output", str(tmp_path / "run"))
    assert str(empty) in error


def test_a_data_file_that_is_no_json(tmp_path, tiny, refused):
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b'{"text": "one"}\n{"text": "tw\n\xff\xfe\n')
    error = refused(
        "run", str(tiny), f"data.sources.0.path={torn}", "data.on_malformed=stop", "--output", str(tmp_path / "run")
    )
    assert str(torn) in error


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing tensor", "wrong shape", "no config"])
def test_a_model_folder_that_cannot_be_read(tmp_path, tiny, refused, checkpoint, damage):
    weights = checkpoint / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "garbage":
        weights.write_bytes(b"\x00" * 4096)
    elif damage == "no config":
        (checkpoint / "config.json").write_text("{")
    else:
        from safetensors.torch import load_file

        tensors = load_file(weights)
        last = tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors if damage == "missing tensor" else {**tensors, "model.layers.1.mlp.up_proj.weight": last[:3]},
                  weights, {"format": "pt"})  # fmt: skip
    error = refused("run", str(tiny), *from_folder(checkpoint), "--output", str(tmp_path / "run"))
    assert str(checkpoint) in error


def test_a_resume_on_other_ranks_that_would_change_the_batch(tmp_path, tiny, refused, of_two_ranks, no_model):
    arguments = ["train.global_batch_sequences=null", "train.steps=2", "--output", str(tmp_path / "run")]
    assert main(["run", str(tiny), *arguments]) == 0
    of_two_ranks(tmp_path / "run/checkpoints/step-000002", rows_per_step=2)
    no_model()
    error = refused("run", str(tiny), *arguments, "--resume")
    assert "was written by 2 ranks with 2 rows per step, but this run of 1 has 1" in error
    assert "add train.global_batch_sequences=2" in error


def test_a_folder_in_which_another_process_is_at_work(tmp_path, tiny, refused, monkeypatch):
    """Until that has ended, in whatever way. A process alone is told before it loads anything."""
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKING, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    command = ["run", str(tiny), "train.steps=2", "--output", str(tmp_path)]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert f"another process uses {tmp_path}" in refused(*command)
    with monkeypatch.context() as alone:
        alone.delenv("RANK")
        alone.setattr("sparsetrain.training.run.run", None)
        assert f"another process uses {tmp_path}" in refused(*command)
    assert not (tmp_path / "recipe.yaml").exists()
    holder.kill()
    holder.wait()
    assert main(["run", str(tiny), "train.steps=2", "--output", str(tmp_path)]) == 0


@pytest.mark.parametrize("multiplies_fp16", [True, False])
def test_a_dtype_that_the_device_does_not_train(multiplies_fp16, tmp_path, tiny, refused, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU does")
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: multiplies_fp16)
    error = refused("run", str(tiny), "model.dtype=float16", "--output", str(tmp_path))
    assert "model.dtype=float16 cannot be trained on a cpu" in error


def test_a_folder_below_a_file(tmp_path, tiny, refused):
    (tmp_path / "file").touch()
    error = refused("run", str(tiny), "--output", str(tmp_path / "file/run"))
    assert f"cannot write the run folder {tmp_path}/file/run: nothing can be written in {tmp_path}/file (Not a" in error


def test_a_folder_that_is_read_only(tmp_path, tiny, refused):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "Permission denied" in refused("run", str(tiny), "--output", str(folder / "run"))


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint(tmp_path, tiny, refused, run_folder, small_disk, stages):
    one = sum(f.stat().st_size for f in (stages(1)[2].path / "checkpoints/step-000006").rglob("*")) // 1024
    run = run_folder(small_disk(int(one * 1.7)) / "run")
    error = refused("run", str(tiny), "checkpoint.every=2", "--output", str(run.path))
    assert f"cannot write checkpoint {run.path}/checkpoints/step-000004" in error
    assert "continue with --resume" in error
    assert run.checkpoints == ["step-000002"]

    shutil.copytree(run.path, tmp_path / "run")
    assert main(["run", str(tiny), "checkpoint.every=2", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert run_folder(tmp_path / "run").values("loss") == stages(1)[2].values("loss")


@pytest.mark.parametrize("kib", [0, 24, 100])
def test_a_disk_that_is_full_from_the_start(tiny, refused, small_disk, kib):
    """Full at the record, at the first export, and at the first checkpoint."""
    folder = small_disk(64 if kib == 0 else kib)
    if kib == 0:
        (folder / "fill").write_bytes(b"\x00" * 60 * 1024)
    error = refused("run", str(tiny), "--output", str(folder / "run"))
    assert "cannot write" in error


def test_reports_that_cannot_be_written_stop_nothing(tmp_path, tiny, run_folder, capfd):
    """A folder in the way of a file that is to be written refuses it as a full disk would."""
    run = run_folder(tmp_path / "run")
    (run.path / "evaluation.json.part").mkdir(parents=True)
    evaluation = (
        "eval={every: 3, at_start: false, at_end: true, tasks: [{task: passkey, lengths: [160], depths: 1, trials: 1}]}"
    )
    assert main(["run", str(tiny), evaluation, "--output", str(run.path)]) == 0
    said = "".join(capfd.readouterr())
    assert said.count(f"warning: the report in {run.path} cannot be written") == 3
    assert "Passkeys found" in said
    assert run.values("step") == [1, 2, 3, 4, 5, 6]
    assert run.weights


def test_a_folder_that_is_deleted_under_a_run_is_made_again(tmp_path, tiny, run_folder, monkeypatch, capfd):
    step = Stepper.take

    def delete(stepper, *rest):
        if stepper.state.step == 3:
            shutil.rmtree(stepper.job.output)
        return step(stepper, *rest)

    monkeypatch.setattr(Stepper, "take", delete)
    run = run_folder(tmp_path / "run")
    assert main(["run", str(tiny), "checkpoint.every=2", "--output", str(run.path)]) == 0
    assert f"warning: {run.path}/metrics.jsonl was deleted during the run" in "".join(capfd.readouterr())
    assert run.values("step") == [4, 5, 6]
    assert run.checkpoints == ["step-000004", "step-000006"]
    assert run.weights
    for name in ("recipe.yaml", "environment.json", ".lock"):
        assert (run.path / name).exists(), name


def test_a_metrics_file_torn_within_a_character_is_read_up_to_there(tmp_path, tiny_recipe):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xc3')
    tracker = Tracker(tiny_recipe(), tmp_path, rank=0)
    tracker.rewind(2)
    tracker.finish()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_results_that_cannot_be_read_are_lost_and_the_run_goes_on(finished, tiny, capfd):
    (finished / "evaluation.json").write_text("")
    assert main(["run", str(tiny), "--output", str(finished), "--resume"]) == 0
    assert "evaluation.json does not hold the results of evaluations; the report continues" in "".join(
        capfd.readouterr()
    )


def test_metrics_that_cannot_be_written_stop_nothing(tmp_path, tiny_recipe):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    said: list[str] = []
    tracker = Tracker(tiny_recipe(), tmp_path, rank=0, say=said.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert said == [f"warning: {tmp_path}/metrics.jsonl cannot be written (No space left on device)"]
