"""A trained model is written whole or not at all, as ``final/`` and as a folder to give away, and its card is true."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sparsetrain
from sparsetrain.cli import main

MEASURE = "eval.tasks.perplexity={lengths: [64], tokens: 4096, source: {path: python-stdlib, split: validation}}"
BLOCK = 4096


@pytest.fixture
def finished(tmp_path, stages):
    """A copy of a finished run of every parameter."""
    return shutil.copytree(stages(1)[2].path, tmp_path / "finished")


@pytest.fixture(scope="module")
def made_adapters(tiny, pretrained, shared):
    """A finished run of adapters."""

    def make(folder):
        model = json.dumps({"path": str(pretrained / "untied"), "dtype": "float32"})
        short = ["train.steps=2", "train.global_batch_sequences=2"]
        run = ["run", str(tiny), f"model={model}", "lora={rank: 4}", *short, "--output", str(folder / "run")]
        assert main(run) == 0

    return shared("adapters-to-export", make) / "run"


@pytest.fixture
def adapters(tmp_path, made_adapters):
    """A copy of it."""
    return shutil.copytree(made_adapters, tmp_path / "adapters")


def kib(folder):
    """What a folder takes of a disk that gives files whole blocks."""
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in folder.rglob("*") if file.is_file()) // 1024


def modes(folder):
    return {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


def card_of(folder):
    return (folder / "README.md").read_text()


def test_the_code_on_the_card_loads_the_folder_that_it_lies_in(finished, tmp_path, monkeypatch):
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(card_of(tmp_path / "out").partition("```python")[2].partition("```")[0], names)
    assert names["model"].config.sparsetrain["attention"]["method"] == "power"


def test_a_model_that_finds_no_room_at_the_end_leaves_no_final_folder(tiny, stages, refused, small_disk, tmp_path):
    made = stages(1)[2].path
    disk = small_disk(kib(made / "checkpoints/step-000006") + kib(made / "final") * 3 // 4)
    error = refused("run", str(tiny), "--output", str(disk / "run"))
    assert f"cannot write the model to {disk}/run/final: " in error
    assert "No space left" in error
    assert "--resume" in error
    assert not list((disk / "run").glob("final*"))
    assert "continue it with --resume" in refused("export", str(disk / "run"), str(tmp_path / "out"))

    shutil.copytree(disk / "run", tmp_path / "run")
    assert main(["run", str(tiny), "--output", str(tmp_path / "run"), "--resume"]) == 0
    ours, theirs = (load_file(run / "final/model.safetensors") for run in (tmp_path / "run", made))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_a_resumed_run_replaces_what_an_interrupted_export_left(tiny, finished):
    shutil.move(finished / "final", finished / "final.tmp")
    (finished / "final.tmp/model-00001-of-00002.safetensors").write_bytes(b"torn")
    (finished / "final").mkdir()
    (finished / "final/of-before").touch()
    assert main(["run", str(tiny), "--output", str(finished), "--resume"]) == 0
    assert [path.name for path in finished.glob("final*")] == ["final"]
    assert not (finished / "final/of-before").exists()
    assert not list((finished / "final").glob("*-of-*"))
    sparsetrain.load(finished / "final")


@pytest.mark.parametrize("kind", ["finished", "adapters"])
@pytest.mark.parametrize("gone", ["config", "weights", "sparsetrain.json", "tokenizer_config.json"])
def test_a_final_folder_that_lacks_a_file_is_not_exported(kind, gone, request, tmp_path, refused):
    run = request.getfixturevalue(kind)
    names = {
        "finished": ("config.json", "model.safetensors"),
        "adapters": ("adapter_config.json", "adapter_model.safetensors"),
    }
    name = dict(zip(("config", "weights"), names[kind], strict=True)).get(gone, gone)
    (run / "final" / name).unlink()
    error = refused("export", str(run), str(tmp_path / "out"))
    assert f"{run}/final is incomplete: {name} is missing; continue the run with --resume" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", ""),
        ("sparsetrain.json", "null"),
        ("tokenizer_config.json", "[" * 200_000),
        ("tokenizer.json", '{"version": '),
        ("generation_config.json", "[]"),
        ("model.safetensors.index.json", "[" * 200_000),
        ("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
    ],
)
def test_a_final_folder_with_a_damaged_file_is_not_exported(finished, tmp_path, refused, name, content):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "final" / name).write_text(content)
    if name == "model.safetensors.index.json":
        (run / "final/model.safetensors").unlink()  # which is read first
    error = refused("export", str(run), str(tmp_path / "out"))
    assert f"{run}/final is incomplete: {name}" in error
    assert not (tmp_path / "out").exists()


def test_torn_and_missing_shards_are_told(finished, tmp_path, refused):
    weights = finished / "final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors cannot be read" in refused("export", str(finished), str(tmp_path / "out"))
    index = finished / "final/model.safetensors.index.json"
    weights.unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    error = refused("export", str(finished), str(tmp_path / "out"))
    assert "model-00001-of-00002.safetensors is missing" in error
    index.write_text("[]")
    assert "model.safetensors.index.json cannot be read" in refused("export", str(finished), str(tmp_path / "out"))


def test_the_card_of_a_run_killed_in_its_last_evaluation_says_that_it_is_missing(tmp_path, start, tiny):
    run = tmp_path / "run"
    overrides = [MEASURE, "eval.at_start=true", "eval.at_end=true", "train.steps=2"]
    ranks = start(run, *overrides)
    ranks.wait_until((run / "final").is_dir)
    ranks.kill()
    assert main(["export", str(run), str(tmp_path / "early")]) == 0
    card = card_of(tmp_path / "early")
    assert "| power, before |" in card
    assert "| power, after |" not in card
    assert "**The trained model was not evaluated:**" in card
    assert "Continue it with `--resume`" in card

    assert main(["run", str(tiny), *overrides, "--output", str(run), "--resume"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert "| power, after |" in card
    assert "not evaluated" not in card
    assert "Nothing was measured" not in card


def test_the_card_of_a_run_that_measured_nothing_says_so(finished, tmp_path):
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    assert "## Evaluation\n\nNothing was measured in the run.\n\n![report](report.png)\n" in card_of(tmp_path / "out")


@pytest.mark.parametrize("damage", ["junk", "{}", "[]", None])
def test_versions_that_were_not_recorded_are_told_in_the_card(finished, tmp_path, damage):
    record = finished / "environment.json"
    record.unlink() if damage is None else record.write_text(damage)
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    assert "the run's environment.json is missing or damaged" in card_of(tmp_path / "out")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_an_export_that_finds_no_room_leaves_nothing_behind(adapters, tmp_path, refused, small_disk, merge, new):
    disk = small_disk(12)
    out = disk / "out"
    if not new:
        out.mkdir()
    flag = ["--merge"] if merge else []
    error = refused("export", str(adapters), str(out), *flag)
    assert error.startswith(f"cannot write {out}: ")
    assert "No space left on device" in error
    assert "[(" not in error
    assert "use a writable folder with enough free space" in error
    assert out.exists() is not new
    assert not list(disk.rglob("*.*"))
    assert main(["export", str(adapters), str(tmp_path / "elsewhere"), *flag]) == 0
    sparsetrain.load(tmp_path / "elsewhere")


def test_an_empty_folder_is_filled_and_keeps_its_place(finished, tmp_path, monkeypatch):
    """It may be a mount, or the working directory."""
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)  # of an export that was killed
    for name in (".sparsetrain-export", "torn"):
        (out / ".partial" / name).touch()
    node = out.stat().st_ino
    monkeypatch.chdir(out)
    assert main(["export", str(finished), "."]) == 0
    assert out.stat().st_ino == node
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in (finished / "final").iterdir()),
        "README.md",
        "report.png",
    }


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_no_export_has_left_is_not_removed(finished, tmp_path, refused, kind):
    partial, precious = tmp_path / "out/.partial", tmp_path / "out/.partial"
    (tmp_path / "out").mkdir()
    if kind == "link":
        precious = tmp_path / "elsewhere"
        partial.symlink_to(precious)
    if kind != "file":
        precious.mkdir()
        precious /= "notes"
    precious.write_text("kept")
    assert f"{partial} was not left by an export; move it away" in refused(
        "export", str(finished), str(tmp_path / "out")
    )
    assert precious.read_text() == "kept"


def test_a_folder_of_the_run_itself_is_refused(finished, tmp_path, refused, monkeypatch):
    for inside in ("final", "checkpoints"):
        error = refused("export", str(finished), str(finished / inside / "out"))
        assert f"lies in {finished}/{inside}, which belongs to the run" in error
    monkeypatch.chdir(finished / "final")
    assert "belongs to the run" in refused("export", str(finished), "out")
    assert not list(finished.rglob("out"))


def test_a_base_that_has_moved_is_given_to_the_export(made_adapters, finished, pretrained, tmp_path, refused):
    run = shutil.copytree(made_adapters, tmp_path / "run")
    record = run / "final/sparsetrain.json"
    record.write_text(record.read_text().replace(str(pretrained / "untied"), str(tmp_path / "gone")))
    merge = ["export", str(run), str(tmp_path / "out"), "--merge"]
    error = refused(*merge)
    assert f"{tmp_path}/gone" in error
    assert "--base" in error
    assert main([*merge, "--base", str(pretrained / "untied")]) == 0
    sparsetrain.load(tmp_path / "out")
    other = ["export", str(run), str(tmp_path / "other")]
    assert "a folder of this machine; give its Hub id with --base" in refused(*other, "--push", "me/x", "--dry-run")
    assert "stay as they were trained: add --merge" in refused(*other, "--dtype", "bfloat16")
    assert main([*other, "--base", str(pretrained / "untied")]) == 0
    sparsetrain.load(tmp_path / "other")
    assert main(["export", str(run), str(tmp_path / "hub"), "--push", "me/x", "--base", "org/base", "--dry-run"]) == 0
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "hub").glob("*.[jm][sd]*"))
    full = shutil.copytree(finished, tmp_path / "full")
    assert "needs no base; leave --base x out" in refused("export", str(full), str(tmp_path / "no"), "--base", "x")


def test_all_files_have_the_mode_that_the_umask_gives(made_adapters, tiny, tmp_path):
    former = os.umask(0o027)
    try:
        run = tmp_path / "run"
        assert main(["run", str(tiny), "train.steps=2", "--output", str(run)]) == 0
        assert modes(run / "final") == {0o640}
        (run / "final/model.safetensors").chmod(0o600)
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
        assert main(["export", str(made_adapters), str(tmp_path / "merged"), "--merge"]) == 0
    finally:
        os.umask(former)
    assert modes(tmp_path / "out") == modes(tmp_path / "merged") == {0o640}


@pytest.mark.parametrize("there", ["a link", "a dangling link", "a file"])
def test_final_goes_where_a_link_leads_and_in_the_place_of_a_file(finished, tiny, tmp_path, there):
    final, larger = finished / "final", tmp_path / "larger"
    if there == "a link":
        shutil.move(final, larger)
        final.symlink_to(larger)
    else:
        shutil.rmtree(final)
        final.write_text("") if there == "a file" else final.symlink_to(larger)
    (finished / "final.tmp").write_text("")
    assert main(["run", str(tiny), "--output", str(finished), "--resume"]) == 0
    assert final.is_symlink() == (there != "a file")
    assert (final / "model.safetensors").is_file()
    assert not (tmp_path / "larger.tmp").exists()


def test_an_export_that_breaks_off_while_it_moves_takes_back_what_it_moved(finished, tmp_path, refused, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    rename, moved = Path.rename, []

    def breaks(path, target):
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", breaks)
        assert "nothing was left there" in refused("export", str(finished), str(out))
    assert not list(out.iterdir())
    assert main(["export", str(finished), str(out)]) == 0
