"""A container without a home, a user, a name that resolves or a clock that only goes forward runs all the same."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sparsetrain.cli import main
from sparsetrain.container import CACHES, prepare_environment


def test_a_home_that_can_be_written_to_is_left_alone(tmp_path):
    environment = {"HOME": str(tmp_path)}
    assert prepare_environment(environment) == []
    assert environment == {"HOME": str(tmp_path)}


@pytest.mark.parametrize("home", ["", "/nonexistent"])
def test_without_a_home_caches_go_to_a_folder_of_their_own(home, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {"HOME": home, "HF_HOME": "/data/hf"}
    (note,) = prepare_environment(environment)
    assert f"HOME={home} cannot be written to" in note
    assert "tokenised data to /data/hf" in note
    assert environment["HF_HOME"] == "/data/hf"
    for variable in set(CACHES) - {"HF_HOME"}:
        assert environment[variable].startswith(str(tmp_path))


@pytest.mark.parametrize("taken_by", ["another user", "a file", "a link", "a dangling link", "all may write"])
def test_a_folder_that_is_not_ours_alone_is_not_used(tmp_path, monkeypatch, taken_by):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user = os.getuid()
    taken = tmp_path / f"sparsetrain-{user}"
    if taken_by == "a file":
        taken.touch()
    elif "link" in taken_by:
        (tmp_path / "elsewhere").mkdir()
        taken.symlink_to(tmp_path / ("nowhere" if taken_by == "a dangling link" else "elsewhere"))
    elif taken_by == "all may write":
        taken.mkdir()
        taken.chmod(0o777)
    else:
        (tmp_path / f"sparsetrain-{user + 1}").mkdir()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    environment = {"HOME": "/nonexistent"}
    prepare_environment(environment)
    folder = Path(environment["XDG_CACHE_HOME"])
    assert folder.parent == tmp_path
    assert folder not in (taken, tmp_path / f"sparsetrain-{user + 1}", tmp_path / "elsewhere")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_our_own_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = {"HOME": "/nonexistent"}, {"HOME": "/nonexistent"}
    prepare_environment(first)
    prepare_environment(second)
    assert first == second


def test_without_a_place_for_temporary_files_a_note_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    environment = {"HOME": "/nonexistent"}
    (note,) = prepare_environment(environment)
    assert "set HF_HOME and TMPDIR" in note


def test_a_user_that_the_system_does_not_know_gets_a_name(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    environment = {"HOME": str(tmp_path)}
    prepare_environment(environment)
    assert environment["USER"] == f"user-{os.getuid()}"


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, tiny, run_folder, monkeypatch):
    """Nor do the times of files: the newest checkpoint is the one of the last step."""
    run = run_folder(tmp_path / "run")
    real, calls = time.time, iter(range(1_000_000_000))
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(calls))
    assert main(["run", str(tiny), "train.steps=4", "checkpoint.every=2", "--output", str(run.path)]) == 0
    assert all(value > 0 for name in ("step_seconds", "tokens_per_second") for value in run.values(name))
    first, last = (run.path / "checkpoints" / name for name in run.checkpoints)
    os.utime(first, (real(), real()))
    os.utime(last, (1, 1))
    shutil.rmtree(run.path / "final")
    assert main(["run", str(tiny), "train.steps=4", "checkpoint.every=2", "--output", str(run.path), "--resume"]) == 0
    assert run.values("step") == [1, 2, 3, 4]


@pytest.fixture
def stranger(tiny):
    """``stranger(*arguments)``: the command that runs the tiny recipe as a user that nobody knows, on a host whose name
    does not resolve, without a home, from a folder that cannot be written to."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs unshare and setpriv")
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(tiny.parent, folder / "recipe")
    recipe = folder / "recipe/tiny.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny.parent), str(folder / "recipe")))
    (folder / "out").mkdir()
    folder.chmod(0o755)
    (folder / "out").chmod(0o777)
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]

    def run(*arguments):
        script = 'hostname no-such-host && cd / && exec "$@"'
        kept = {name: value for name, value in os.environ.items() if name not in CACHES and name != "USER"}
        return subprocess.run(
            ["unshare", "--uts", "sh", "-c", script, "sh", *user, sys.executable, *arguments],
            env={**kept, "HOME": "/nonexistent", "TMPDIR": str(folder / "out")},
            capture_output=True,
            text=True,
        )

    run.recipe, run.output = recipe, folder / "out/run"
    if (tried := run("-c", "import sparsetrain")).returncode:
        pytest.skip(f"such a user cannot be had here: {tried.stderr.strip()[-200:]}")
    yield run
    shutil.rmtree(folder)


def test_a_user_without_name_home_and_host_trains(stranger, run_folder):
    output = ["--output", str(stranger.output)]
    done = stranger(
        "-m", "sparsetrain.cli", "run", str(stranger.recipe), "train.steps=2", "wandb.mode=offline", *output
    )
    assert done.returncode == 0, done.stderr
    assert "note: HOME=/nonexistent cannot be written to" in done.stderr
    assert "warning: W&B" not in done.stderr
    assert len(run_folder(stranger.output).steps) == 2
