"""Checkpoints are written beside the training, checked when they are read, and never lost to a failed save."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from sparsetrain.cli import main
from sparsetrain.errors import CheckpointError
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.training.checkpoints import saver, store
from sparsetrain.training.checkpoints.files import PieceReader, checksum_of
from sparsetrain.training.checkpoints.manifest import tensor_files
from sparsetrain.training.output import evaluations
from sparsetrain.training.output.tracking import Tracker
from sparsetrain.training.step import Stepper


@pytest.fixture(scope="module")
def every_step(tiny, shared, run_folder):
    """A run of six steps with a checkpoint of each, written while training waited."""

    def make(folder):
        arguments = ["checkpoint.every=1", "checkpoint.keep_last=6", "checkpoint.asynchronous=false"]
        assert main(["run", str(tiny), *arguments, "--output", str(folder / "run")]) == 0

    return run_folder(shared("every-step", make) / "run")


def checksums(run):
    """CRC-32 of every file of tensors and of the random states, by checkpoint."""
    return {
        name: {
            file: entry["crc32"]
            for file, entry in json.loads((run.path / "checkpoints" / name / "manifest.json").read_text()).items()
            if file.startswith("rank-")
        }
        for name in run.checkpoints
    }


def test_a_checkpoint_written_while_training_goes_on_is_that_of_its_step(
    tmp_path, tiny, run_folder, every_step, monkeypatch
):
    """The writer is so slow that the next step has changed every weight before its file is begun."""
    steps: list[int] = []
    waited: list[tuple[int, int]] = []
    write, step = saver.write_blocks, Stepper.take

    def slow(path, *rest):
        begun = steps[-1]
        deadline = time.monotonic() + 5.0
        while threading.current_thread() is not threading.main_thread() and steps[-1] == begun:
            assert time.monotonic() < deadline, "training waits for the writer"
            time.sleep(0.001)
        waited.append((begun, steps[-1]))
        return write(path, *rest)

    def counted(stepper, *rest):
        result = step(stepper, *rest)
        steps.append(stepper.state.step + 1)
        return result

    monkeypatch.setattr(saver, "write_blocks", slow)
    monkeypatch.setattr(Stepper, "take", counted)
    run = run_folder(tmp_path / "run")
    assert main(["run", str(tiny), "checkpoint.every=2", "checkpoint.keep_last=6", "--output", str(run.path)]) == 0
    assert waited == [(2, 3), (4, 5), (6, 6)]
    wanted = checksums(every_step)
    assert checksums(run) == {name: wanted[name] for name in ("step-000002", "step-000004", "step-000006")}
    assert (run.path / "checkpoints/latest").read_text() == "step-000006\n"


def test_a_changed_byte_is_found_and_the_checkpoint_before_taken(tmp_path, tiny, run_folder, every_step, capfd):
    run = run_folder(tmp_path / "run")
    shutil.copytree(every_step.path, run.path)
    newest = run.path / "checkpoints/step-000006/rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (run.path / "checkpoints/step-000005/state.json").unlink()
    assert main(["run", str(tiny), "checkpoint.keep_last=6", "--output", str(run.path), "--resume"]) == 0
    said = "".join(capfd.readouterr())
    assert "skipping step-000006: rank-00000.safetensors is not what was written" in said
    assert "skipping step-000005: state.json is missing" in said
    assert "at step 4" in said
    assert run.values("loss") == every_step.values("loss")
    assert checksums(run)["step-000006"] == checksums(every_step)["step-000006"]
    assert checksum_of(newest) == checksums(run)["step-000006"][newest.name], "the damaged one still stands"


def test_a_checkpoint_that_was_passed_over_is_not_counted_among_those_to_keep(tmp_path, run_folder, every_step):
    run = run_folder(tmp_path / "run")
    shutil.copytree(every_step.path, run.path)
    store.prune(run.path / "checkpoints/step-000004", keep_last=2)
    assert run.checkpoints == ["step-000003", "step-000004", "step-000005", "step-000006"]
    # A million steps are a name of seven digits.
    (run.path / "checkpoints/step-000006").rename(run.path / "checkpoints/step-1000000")
    store.prune(run.path / "checkpoints/step-1000000", keep_last=1)
    assert run.checkpoints == ["step-1000000"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"state.json": 7}',
        '{"state.json": {"bytes": 7}}',
        '{"../x": {"bytes": 7, "crc32": ""}}',
        pytest.param('{"' + 300 * "x" + '": {"bytes": 7, "crc32": ""}}', id="a long name"),
        pytest.param(100_000 * "[", id="deep"),
    ],
)
def test_a_manifest_that_says_nothing_is_a_fault_of_the_checkpoint(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert "no readable manifest" in store.fault(tmp_path)


@pytest.mark.parametrize("gone", ["state.json", "rank-00000.json", "rank-00000.safetensors"])
def test_a_manifest_that_leaves_out_a_file_is_a_fault_of_the_checkpoint(every_step, tmp_path, gone):
    """Nobody would notice that the file is another one."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(every_step.path / "checkpoints/step-000006", folder)
    assert store.fault(folder) is None
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[gone]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"its manifest does not list {gone}" == store.fault(folder)


def test_files_that_others_left_in_a_checkpoint_are_not_read(tmp_path, tiny, run_folder, every_step):
    run = run_folder(tmp_path / "run")
    shutil.copytree(every_step.path, run.path)
    shutil.rmtree(run.path / "checkpoints/step-000006")
    old, new = (run.path / f"checkpoints/step-{step:06d}" for step in (3, 5))
    shutil.copyfile(old / "rank-00000.safetensors", new / "rank-00000-old.safetensors")
    (new / "rank-00000.bak.safetensors").write_bytes(b"no tensors")
    assert main(["run", str(tiny), "checkpoint.keep_last=6", "--output", str(run.path), "--resume"]) == 0
    assert run.values("loss") == every_step.values("loss")


@pytest.mark.parametrize("value", ["Infinity", "NaN", pytest.param(400 * "9", id="large"), '"high"'])
def test_a_best_that_nothing_could_beat_counts_for_nothing(tmp_path, every_step, value):
    shutil.copytree(every_step.path / "checkpoints", tmp_path / "checkpoints")
    best = f'{{"checkpoint": "step-000005", "metric": "passkey", "value": {value}}}'
    (tmp_path / "checkpoints/best.json").write_text(best)
    assert store.read_best(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("best", ['{"checkpoint": "step-000005", "value": 1}', '{"checkpoint": 5}', "[]", ""])
def test_a_best_that_says_nothing_counts_for_nothing(tmp_path, every_step, best):
    shutil.copytree(every_step.path / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/best.json").write_text(best)
    assert store.read_best(tmp_path / "checkpoints") is None


def test_a_file_in_the_place_of_a_checkpoint_makes_way(tmp_path, tiny, run_folder):
    run = run_folder(tmp_path / "run")
    (run.path / "checkpoints").mkdir(parents=True)
    (run.path / "checkpoints/step-000002").write_text("")
    assert main(["run", str(tiny), "train.steps=2", "--output", str(run.path)]) == 0
    assert store.fault(run.path / "checkpoints/step-000002") is None


def test_a_part_that_is_missing_is_named(every_step, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(every_step.path / "checkpoints/step-000006", folder)
    name = "model.model.norm.weight"
    reader = PieceReader(tensor_files(folder))
    assert reader.whole("exp_avg", name).shape == (32,)
    with pytest.raises(CheckpointError, match=r"lacks elements 32 to 39 of exp_avg of model\.model\.norm\.weight"):
        reader.read_into(torch.empty(10), "exp_avg", name, 30)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("mount") is None, reason="needs mount")
def test_a_full_disk_is_told_and_the_next_checkpoint_tried(tmp_path, tiny, run_folder, every_step, monkeypatch, capfd):
    """Between the two somebody makes room."""
    size = sum(file.stat().st_size for file in (every_step.path / "checkpoints/step-000006").iterdir()) // 1024
    run, disk = run_folder(tmp_path / "run"), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * size)}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        run.path.mkdir()
        (run.path / "checkpoints").symlink_to(disk)
        filler = disk / "filler"
        filler.write_bytes(b"\x00" * int(0.9 * size * 1024))
        alerts = []
        monkeypatch.setattr(Tracker, "alert", lambda _, title, text: alerts.append(text) or filler.unlink())
        arguments = ["checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.on_failure=continue"]
        assert main(["run", str(tiny), *arguments, "--output", str(run.path)]) == 0
        said = "".join(capfd.readouterr())
        assert f"warning: cannot write checkpoint {run.path}/checkpoints/step-000004: " in said
        assert "No space left on device" in said
        assert [text.rpartition(": ")[2] for text in alerts] == ["the checkpoint of step 4 cannot be written"]
        assert [line["step"] for line in run.lines if "checkpoint_failed" in line] == [5]
        assert run.checkpoints == ["step-000006"]
        assert checksums(run)["step-000006"] == checksums(every_step)["step-000006"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_a_folder_that_vanishes_stops_the_run_or_not(tmp_path, tiny, run_folder, monkeypatch, refused):
    """A file in its place, as a lost mount would be nothing that root may not write to."""
    step = Stepper.take

    def vanish(stepper, *rest):
        folder = stepper.job.checkpoints
        if stepper.state.step == 3 and folder.is_dir():
            folder.rename(stepper.job.output / "elsewhere")
            folder.touch()
        return step(stepper, *rest)

    monkeypatch.setattr(Stepper, "take", vanish)
    arguments = ["checkpoint.every=2", "--output"]
    error = refused("run", str(tiny), *arguments, str(tmp_path / "stop"))
    assert f"cannot write checkpoint {tmp_path}/stop/checkpoints/step-000004: " in error
    assert "Not a directory" in error
    assert "checkpoint.on_failure: continue" in error
    assert run_folder(tmp_path / "stop").values("step") == [1, 2, 3, 4]
    assert (tmp_path / "stop/elsewhere/step-000002/manifest.json").exists()
    run = run_folder(tmp_path / "go-on")
    assert main(["run", str(tiny), "checkpoint.on_failure=continue", *arguments, str(run.path)]) == 0
    assert run.values("step") == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in run.lines if "checkpoint_failed" in line] == [4, 6]
    assert (run.path / "final/model.safetensors").exists()


def test_an_error_of_the_run_waits_for_the_checkpoint_that_is_being_written(tmp_path, tiny, run_folder, monkeypatch):
    write, step = saver.write_blocks, Stepper.take

    def slow(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    def broken(stepper, *rest):
        if stepper.state.step == 2:
            raise RuntimeError("broken")
        return step(stepper, *rest)

    monkeypatch.setattr(saver, "write_blocks", slow)
    monkeypatch.setattr(Stepper, "take", broken)
    run = run_folder(tmp_path / "run")
    with pytest.raises(RuntimeError, match="broken"):
        main(["run", str(tiny), "checkpoint.every=2", "--output", str(run.path)])
    assert run.checkpoints == ["step-000002"]
    assert (run.path / "checkpoints/latest").read_text() == "step-000002\n"


def test_the_best_checkpoint_stays_beside_the_last(tmp_path, tiny, run_folder, monkeypatch):
    """Also across a resume, and when the evaluation at the end is the best of all. One that is due is complete while
    its step is evaluated, before that says whether it is the best."""
    measured = dict(zip((1, 2, 3, 4, 5, 6), (5.0, 9.0, 9.5, 8.0, float("nan"), 8.0), strict=True))
    state = {"step": 0}
    step = Stepper.take

    def counted(stepper, *rest):
        state["step"] = stepper.state.step + 1
        return step(stepper, *rest)

    monkeypatch.setattr(Stepper, "take", counted)
    monkeypatch.setattr(EvalResult, "score", lambda result, name: measured[state["step"]])
    run, evaluate, seen = run_folder(tmp_path / "run"), evaluations.evaluate, {}

    def seeing(*given, on_progress, **options):
        def progress(done, total):
            for thread in threading.enumerate():
                if thread.name == "sparsetrain-checkpoint":
                    thread.join()
            on_progress(done, total)
            seen[state["step"]] = run.checkpoints

        return evaluate(*given, on_progress=progress, **options)

    monkeypatch.setattr(evaluations, "evaluate", seeing)
    passkey = (
        "eval={every: 1, at_start: false, at_end: true, tasks: [{task: passkey, lengths: [160], depths: 1, trials: 1}]}"
    )
    arguments = [passkey, "checkpoint.keep_best=passkey", "checkpoint.every=3", "checkpoint.keep_last=1"]
    assert main(["run", str(tiny), *arguments, "--output", str(run.path)]) == 0
    best = run.path / "checkpoints/best.json"
    assert json.loads(best.read_text()) == {"checkpoint": "step-000003", "metric": "passkey", "value": 9.5}
    assert run.checkpoints == ["step-000003", "step-000006"]
    # Step 2 was the best before.
    assert seen[3] == ["step-000002", "step-000003"]

    shutil.rmtree(run.path / "checkpoints/step-000006")
    measured[6] = 10.0
    assert main(["run", str(tiny), *arguments, "--output", str(run.path), "--resume"]) == 0
    assert json.loads(best.read_text())["checkpoint"] == "step-000006"
    assert run.checkpoints == ["step-000006"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.keep_best=passkey"], "passkey is not measured during training: give eval.every"),
        (
            ["checkpoint.keep_best=recall", "eval.every=1"],
            "nothing measures recall, and eval.tasks is empty; give eval.tasks one",
        ),
        (["checkpoint.keep_best=loss"], "checkpoint.keep_best"),
        (["checkpoint.on_failure=ignore"], "checkpoint.on_failure"),
    ],
)
def test_a_checkpoint_section_that_cannot_be_kept_is_refused(tmp_path, tiny, refused, overrides, said):
    assert said in refused("run", str(tiny), *overrides, "--output", str(tmp_path / "run"))


# Trains in a child that is killed as soon as the save of a checkpoint has come so far, and again after a resume.
# The imports are paid once.
KILLED_WHILE_SAVING = """
import json, os, signal, sys, time
from pathlib import Path
import deepspeed, peft, torch, transformers
from sparsetrain.cli import main
from sparsetrain.training import run
from sparsetrain.training.checkpoints import manifest, saver, store

arguments, moments = json.loads(sys.argv[1])
checkpoints = Path(arguments[-1]) / "checkpoints"
arguments.append("--resume")

def slowly(function):
    def slow(*given):
        result = function(*given)
        time.sleep(0.02)
        return result
    return slow

store.make_partial, store.write_text = slowly(store.make_partial), slowly(store.write_text)
manifest.write_text = slowly(manifest.write_text)
saver.write_text, saver.write_blocks = slowly(saver.write_text), slowly(saver.write_blocks)
for moment in [*moments, None]:
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    while moment is not None and not any(checkpoints.glob(moment)):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), moment
        time.sleep(0.0005)
    if moment is not None:
        os.kill(child, signal.SIGKILL)
        left = sorted(str(path.relative_to(checkpoints)) for path in checkpoints.rglob("*"))
        print("KILLED", moment, left, flush=True)
    _, status = os.waitpid(child, 0)
    assert status == (0 if moment is None else signal.SIGKILL), (moment, status)
"""


def test_killed_at_every_stage_of_a_save_it_ends_as_if_uninterrupted(tmp_path, tiny, ranks_of, run_folder, every_step):
    moments = [
        "step-000001.tmp",
        "step-000001.tmp/rank-00000.safetensors",
        "step-000003.tmp/rank-00000.json",
        "step-000004.tmp/manifest.json",
        "step-000005",
    ]
    run = run_folder(tmp_path / "run")
    arguments = ["run", str(tiny), "checkpoint.every=1", "checkpoint.keep_last=2", "--output", str(run.path)]
    command = ["-c", KILLED_WHILE_SAVING, json.dumps([arguments, moments])]
    said = ranks_of(command, tmp_path / "log").wait(0)
    kills = [line for line in said.splitlines() if line.startswith("KILLED")]
    assert len(kills) == len(moments)
    resumed = [int(line.rpartition(" ")[2]) for line in said.splitlines() if "resumed" in line]
    assert resumed == sorted(resumed)
    assert {2, 3} <= set(resumed)
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert run.values(name) == every_step.values(name), name
    assert run.checkpoints == ["step-000005", "step-000006"]
    wanted = checksums(every_step)
    assert checksums(run) == {name: wanted[name] for name in run.checkpoints}
