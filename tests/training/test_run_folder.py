"""Nothing that is worth anything is written over, and a resumed run changes only what it may."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from sparsetrain.cli import main
from sparsetrain.training.changes import changes, read_history


@pytest.fixture
def finished(tmp_path, stages):
    """A copy of a finished run."""
    folder = tmp_path / "finished"
    shutil.copytree(stages(1)[2].path, folder)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


RECORDS = ["metrics.jsonl", "recipe.yaml", "environment.json", "deepspeed.json", "report.md", "evaluation.json"]


@pytest.mark.parametrize(
    "gone", [[], ["metrics.jsonl"], ["recipe.yaml"], RECORDS, [*RECORDS, "final"], ["checkpoints"]]
)
def test_a_folder_that_holds_a_run_is_left_alone(finished, tiny, refused, gone):
    """Whichever of its records are missing."""
    for name in gone:
        shutil.rmtree(finished / name) if (finished / name).is_dir() else (finished / name).unlink(missing_ok=True)
    before = content(finished)
    error = refused("run", str(tiny), "train.lr=1", "--output", str(finished))
    assert f"{finished} already holds a run; continue it with --resume, or choose another folder" in error
    assert ("final" if "checkpoints" in gone else "checkpoints/step-000006") in error
    assert content(finished) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recipe.yaml", "holds recipe.yaml, which this run would overwrite"),
        ("loss.png", "holds loss.png, which this run would overwrite"),
        ("environment.json", "holds environment.json, which this run would overwrite"),
        ("model.safetensors", "already holds a run"),
        ("config.json", "already holds a run"),
        ("export/adapter_config.json", "already holds a run"),
        ("final", "already holds a run"),
        ("checkpoints/step-000002", "already holds a run"),
        ("evaluation.json", "already holds a run"),
    ],
)
def test_the_files_of_somebody_else_are_left_alone(tmp_path, tiny, refused, name, said):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("# mine\n")
    error = refused("run", str(tiny), "--output", str(folder))
    assert said in error
    assert name.split("/")[-1] in error or name.split("/")[0] in error
    assert content(folder) == {folder / name: b"# mine\n"}


USED = """
import sys
from sparsetrain.cli import main
assert main(["run", "quickstart", "--output", sys.argv[1]]) == 2
loaded = {"torch", "transformers", "deepspeed"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_a_used_folder_is_refused_before_the_libraries_are_loaded(finished):
    ended = subprocess.run([sys.executable, "-c", USED, str(finished)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"{finished} already holds a run" in ended.stderr


@pytest.mark.parametrize("name", [".lock", "recipe.yaml", "checkpoints/latest"])
def test_a_folder_in_the_place_of_a_file_is_named_at_the_start(tmp_path, tiny, refused, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    error = refused("run", str(tiny), "--output", str(tmp_path / "run"))
    assert f"{tmp_path}/run/{name} is a folder, but a run writes a file with that name" in error


def test_a_file_in_the_place_of_the_checkpoints_is_named_at_the_start(tmp_path, tiny, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    error = refused("run", str(tiny), "--output", str(tmp_path / "run"))
    assert f"{tmp_path}/run/checkpoints is not a folder" in error


def test_a_file_that_cannot_be_written_is_named(tmp_path, tiny, refused):
    (tmp_path / "run/recipe.yaml.part").mkdir(parents=True)
    error = refused("run", str(tiny), "--output", str(tmp_path / "run"))
    assert f"{tmp_path}/run/recipe.yaml.part: it is a folder" in error


@pytest.mark.parametrize("part", ["final", "checkpoints", "checkpoints/step-000006", "final/new"])
def test_a_folder_within_another_run(finished, tiny, refused, part):
    assert "which belongs to another run" in refused("run", str(tiny), "--output", str(finished / part))


def test_a_folder_whose_run_never_began_is_free(tmp_path, tiny, refused, run_folder):
    """The mistake is corrected, and the same command works; notes that lie beside it stay."""
    run = run_folder(tmp_path / "run")
    refused("run", str(tiny), "model.architecture.vocab_size=300", "--output", str(run.path))
    (run.path / "notes.txt").write_text("mine")
    assert main(["run", str(tiny), "train.steps=2", "--output", str(run.path)]) == 0
    assert len(run.steps) == 2
    assert (run.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("record", ["as it was", "damaged", "gone"])
def test_a_resume_compares_with_the_recipe_of_the_checkpoint(finished, tiny, refused, record):
    if record == "damaged":
        (finished / "recipe.yaml").write_text("")
    elif record == "gone":
        for name in RECORDS:
            (finished / name).unlink(missing_ok=True)
    before = content(finished)
    changed = ["train.lr=1", "attention.window=3", "train.warmup=1", "train.optimizer.eps=1e-4"]
    error = refused("run", str(tiny), *changed, "--output", str(finished), "--resume")
    assert "attention.window: 2 -> 3 (the weights of the checkpoint belong to it)" in error
    assert "train.warmup: 2.0 -> 1.0 (it determined the learning rate of earlier steps" in error
    assert "train.optimizer.eps: 0.001 -> 0.0001 (the optimizer's state depends on it)" in error
    assert "train.lr: 0.01 ->" not in error
    assert content(finished) == before


def test_a_resume_does_not_start_over_where_something_would_be_lost(finished, tiny, refused):
    (finished / "checkpoints/step-000006/state.json").write_text("{}")
    before = content(finished)
    error = refused("run", str(tiny), "--output", str(finished), "--resume")
    assert f"there is no complete checkpoint in {finished} to resume from" in error
    assert "skipping step-000006: state.json has 2 bytes instead of" in error
    assert content(finished) == before
    shutil.rmtree(finished / "checkpoints")
    assert "would overwrite final" in refused("run", str(tiny), "--output", str(finished), "--resume")


def test_a_resumed_run_may_change_its_rate_length_faults_and_where_its_data_lies(
    finished, tiny, tmp_path, run_folder, capfd
):
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(tiny.parent / "corpus.jsonl", moved)
    free = ["train.log_every=2", "checkpoint.keep_last=5", "eval.at_end=true", "name=other", "data.num_workers=2"]
    changed = ["train.steps=8", "train.lr=0.005", "train.on_nonfinite=skip", f"data.sources.0.path={moved}"]
    assert main(["run", str(tiny), *free, *changed, "--output", str(finished), "--resume"]) == 0
    said = "".join(capfd.readouterr())
    assert "changed: from step 7 on, train.lr: 0.01 -> 0.005" in said
    assert "changed: the rate of step 7 is" in said
    assert "cosine is a function of all 8 steps" in said
    run = run_folder(finished)
    history = run.state("step-000008")["history"]
    assert [(line["step"], line["key"]) for line in history] == [
        (6, f"{key}") for key in ("data.sources.0.path", "train.lr", "train.on_nonfinite", "train.steps")
    ]
    assert json.loads((finished / "history.json").read_text()) == history
    assert "from step 7 on, train.steps: 6 -> 8" in read_history(finished)
    assert "- from step 7 on, train.lr: 0.01 -> 0.005" in (finished / "report.md").read_text()

    # A second resume carries the history on, and compares with the recipe of the last checkpoint.
    assert main(["run", str(tiny), *free, *changed, "train.lr=0.001", "--output", str(finished), "--resume"]) == 0
    assert [line["before"] for line in json.loads((finished / "history.json").read_text())][-1] == 0.005


def test_data_that_lies_elsewhere_must_be_the_same(finished, tiny, tmp_path, refused):
    moved = tmp_path / "elsewhere.jsonl"
    text = (tiny.parent / "corpus.jsonl").read_text()
    moved.write_text(text.replace("green", "white", 1))
    arguments = [f"data.sources.0.path={moved}", "--output", str(finished), "--resume"]
    error = refused("run", str(tiny), *arguments)
    assert "elsewhere.jsonl' differ from those that this run was trained on (tokens of each source" in error
    assert "restore the data of that run to resume it" in error


def test_fewer_steps_than_were_taken(finished, tiny, refused, no_model):
    no_model()
    error = refused("run", str(tiny), "train.steps=4", "--output", str(finished), "--resume")
    assert "step-000006 is at step 6, but this run has only 4" in error


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.on_malformed=skip", None),
        ("data.sources.0.name=other", None),
        ("data.sources.0.text_field=body", None),
        ("data.sources.0.split=test", None),
        ("data.sources.0.weight=2", "the saved position in the data would mean other rows"),
        ("data.sources.0.streaming=true", "the saved position in the data would mean other rows"),
        ("data.sources.1.lengths=[150]", "the saved position in the data would mean other rows"),
        ("sequence.packing=false", "the saved position in the data would mean other rows"),
        ("train.seed=1", "the saved position in the data would mean other rows"),
        ("train.schedule=linear", "it determined the learning rate of earlier steps"),
        ("train.max_grad_norm=1.0", "the optimizer's state depends on it"),
        ("model.dtype=bfloat16", "the weights of the checkpoint belong to it"),
        ("attention.window=3", "the weights of the checkpoint belong to it"),
    ],
)
def test_what_may_change_on_resume(tiny_recipe, override, reason):
    recorded, refused = changes(tiny_recipe(), tiny_recipe(override))
    if reason is None:
        assert refused == []
        assert (recorded == []) == override.startswith("data.sources.0.name")
    else:
        assert any(reason in line for line in refused)


def test_a_stream_may_not_move(tiny_recipe):
    stream = "data.sources.0.streaming=true"
    _, (line,) = changes(tiny_recipe(stream), tiny_recipe(stream, "data.sources.0.path=x.jsonl"))
    assert "rows of a streaming source at another location cannot be compared" in line
