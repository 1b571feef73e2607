"""The wheel and the sdist, built as a release is; the wheel in a fresh environment runs the quickstart's command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from sparsetrain.doctor.installation import PYTHON, TESTED

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("sparsetrain", "recipes", "launch", "kernels/sparsetrain_kernels")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build in a copy of the tree: setuptools leaves files beside the sources."""
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def copy_tree(target: Path) -> Path:
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, target / name)
    return target


@pytest.fixture(scope="session")
def wheel(shared):
    folder = shared("wheel", lambda top: build("wheel", copy_tree(top / "tree"), top / "dist"))
    return next((folder / "dist").glob("*.whl"))


def names(file: Path) -> set[str]:
    with zipfile.ZipFile(file) as held:
        return set(held.namelist())


def test_the_wheel_runs_the_quickstart_in_a_fresh_environment(wheel, tmp_path):
    place = tmp_path / "fresh"
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    with zipfile.ZipFile(wheel) as held:
        held.extractall(packages)
    # The dependencies are those of this environment, whose own sparsetrain lies elsewhere.
    held = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(held))
    short = [
        *("train.steps=1", "train.micro_batch=1"),
        "sequence.length=256",
        "data.sources=[{synthetic: passkey, lengths: [200]}]",
        "eval.at_start=false",
        "eval.at_end=false",
        "wandb.mode=disabled",
    ]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [str(place / "bin/python"), "-m", "sparsetrain.cli", "run", "quickstart", *short]
    done = subprocess.run(run, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/quickstart/final/model.safetensors").is_file()
    assert (tmp_path / "runs/quickstart/report.html").is_file()


def test_the_sdist_holds_all_that_the_wheel_is_built_from(wheel, tmp_path):
    sdist = build("sdist", copy_tree(tmp_path / "tree"), tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert names(build("wheel", tree, tmp_path / "dist")) == names(wheel)


def test_the_metadata_declares_what_was_tried(wheel):
    with zipfile.ZipFile(wheel) as held:
        (file,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = held.read(file).decode()
    oldest, newest = (int(version.partition(".")[2]) for version in PYTHON)
    versions = re.findall(r"^Classifier: Programming Language :: Python :: 3\.(\d+)$", metadata, re.MULTILINE)
    assert [int(version) for version in versions] == list(range(oldest, newest + 1))
    assert f"Requires-Python: >={PYTHON[0]}" in metadata
    floors = dict(
        re.findall(
            r"^Requires-Dist: ([\w-]+)(?:!=[\d.]+,)?>=([\d.]+)(?:;.*platform_system.*)?$", metadata, re.MULTILINE
        )
    )
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints-oldest.txt").read_text().split() if "==" in line
    )
    assert {name: pinned[name] for name in floors} == floors
    assert {name: floors[name] for name in TESTED} == {name: oldest for name, (oldest, _) in TESTED.items()}
