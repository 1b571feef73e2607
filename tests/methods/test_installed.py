"""Methods and evaluation tasks of other installed packages: the examples of the docs, in a fresh environment."""

from __future__ import annotations

import json
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from sparsetrain import load
from sparsetrain.errors import ModelError

ROOT = Path(__file__).parents[2]
PAGES = {"every-third": "adding-a-method.md", "echoes": "evaluation.md"}
"""The page that an example package stands on."""
SHORT = ["sequence.length=128", "train.steps=2", "train.micro_batch=1", "train.global_batch_sequences=2", "eval={}"]
SHORT += ["wandb.mode=disabled"]
THIRDS = "attention={method: thirds, block: 16}"
ECHOES = "eval.tasks=[{task: echoes, length: 32}]"
TEMPERED = "attention={method: tempered, window: 48}"

BROKEN = """
[build-system]
requires = ["setuptools >= 77"]
build-backend = "setuptools.build_meta"
[project]
name = "no-good"
version = "2.0"
[project.entry-points."sparsetrain.methods"]
gone = "no_such_module:Config"
leaves = "leaves:Config"
number = "thirds:__doc__"
other = "thirds:ThirdsConfig"
partial = "partial:PartialConfig"
sliding = "thirds:ThirdsConfig"
twice = "thirds:ThirdsConfig"
[project.entry-points."sparsetrain.tasks"]
absent = "no_such_module:Section"
failing = "leaves:Section"
method = "thirds:ThirdsConfig"
recall = "echoes:EchoesSection"
renamed = "echoes:EchoesSection"
shared = "echoes:EchoesSection"
[tool.setuptools]
py-modules = ["leaves", "partial"]
"""
PARTIAL = """
from typing import Literal
from sparsetrain.methods.base import MethodConfig
class PartialConfig(MethodConfig):
    method: Literal["partial"] = "partial"
    def pattern(self, num_kv_heads=1):
        return None
"""
RIVAL = """
[sparsetrain.methods]
twice = thirds:ThirdsConfig
[sparsetrain.tasks]
shared = echoes:EchoesSection
"""
COMMANDS = """
import contextlib, io, json, sys
from sparsetrain.cli import main
results = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as left:
            code = left.code
    results.append([code, out.getvalue(), err.getvalue()])
print("RESULTS" + json.dumps(results))
"""
GENERATE = """
import json, sys, torch, sparsetrain
results = []
for folder in sys.argv[1:]:
    model = sparsetrain.load(folder).eval()
    ids = torch.arange(5, 65)[None]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    again = ids
    for _ in range(6):
        again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    results.append([model.config.sparsetrain, found.tolist() == again.tolist()])
print("RESULTS" + json.dumps(results))
"""


DOCTOR = """
import json
from sparsetrain.doctor import check_packages
print("RESULTS" + json.dumps([[finding.status, finding.found] for finding in check_packages()]))
"""


class Environment:
    """A virtual environment that borrows the packages of this one, and holds what is installed into it."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin/python"
        venv.EnvBuilder(symlinks=True).create(folder)
        self.packages = own = next((folder / "lib").glob("python*/site-packages"))
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (own / "borrowed.pth").write_text("".join(lines))

    def install(self, *packages: Path) -> None:
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", self.python, "install", *options, *packages],
            check=True,
            cwd=ROOT.parent,
        )

    def results(self, program: str, *arguments: str) -> list:
        done = subprocess.run([self.python, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("RESULTS")[2])

    def commands(self, *commands: list[str]) -> list:
        """Exit code, output and errors of each command line."""
        return self.results(COMMANDS, json.dumps(commands))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    """The packages of the pages, and one of which nothing can be used."""
    good, bad = {name: tmp_path_factory.mktemp(name) for name in PAGES}, tmp_path_factory.mktemp("no-good")
    for package, page in PAGES.items():
        content = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", content, re.DOTALL):
            (good[package] / name).write_text(text)
    (bad / "pyproject.toml").write_text(BROKEN)
    (bad / "leaves.py").write_text("import sys\nsys.exit(5)\n")
    (bad / "partial.py").write_text(PARTIAL)
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.install(*good.values(), bad)
    rival = made.packages / "rival-3.0.dist-info"
    rival.mkdir()
    (rival / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 3.0\n")
    (rival / "entry_points.txt").write_text(RIVAL)
    return made


@pytest.fixture(scope="module")
def runs(environment, tmp_path_factory) -> dict:
    """A short run of each method, and what it said."""
    folder = tmp_path_factory.mktemp("runs")
    sections = {"thirds": THIRDS, "tempered": TEMPERED}
    stages = {"thirds": "deepspeed.stage=2", "tempered": "deepspeed.stage=3"}
    commands = [
        ["run", "quickstart", *SHORT, ECHOES, sections[name], stages[name], f"output={folder / name}"]
        for name in sections
    ]
    done = dict(zip(sections, environment.commands(*commands), strict=True))
    return {name: (folder / name, *done[name]) for name in sections}


@pytest.mark.parametrize("method", ["thirds", "tempered"])
def test_an_installed_method_trains_and_is_checked_against_its_oracle(runs, method):
    folder, code, out, err = runs[method]
    assert code == 0, err
    assert "layer 0 equals its oracle on" in out + err
    assert (folder / "final/config.json").is_file()


def test_what_a_learned_method_adds_is_trained_and_saved(runs):
    from safetensors.torch import load_file

    factors = [
        tensor
        for name, tensor in load_file(runs["tempered"][0] / "final/model.safetensors").items()
        if name.endswith("self_attn.temperature.factor")
    ]
    assert factors
    assert all(factor.item() != 1.0 for factor in factors)


def test_a_saved_model_loads_with_its_package_and_generates(environment, runs):
    for record, equal in environment.results(GENERATE, *(str(run[0] / "final") for run in runs.values())):
        assert record["package"] == "every-third 0.1"
        assert equal


def test_without_its_package_a_saved_model_is_refused_by_its_name(runs):
    with pytest.raises(ModelError, match=r"there is no 'thirds'.*was written with the package every-third 0\.1"):
        load(runs["thirds"][0] / "final")


def test_it_is_planned_described_and_in_the_schema(environment, runs):
    kept, plan, tempered, dense, schema, unknown, field = environment.commands(
        ["recipe", "show", str(runs["thirds"][0] / "recipe.yaml")],
        ["plan", "qwen3-8b-power-128k", "attention.method=thirds"],
        ["plan", "qwen3-8b-power-128k", "attention.method=tempered", "train.parameters=new_modules"],
        ["plan", "qwen3-8b-power-128k", "attention.method=full"],
        ["recipe", "schema"],
        ["recipe", "validate", "quickstart", "attention.method=third"],
        ["recipe", "validate", "quickstart", "attention.method=tempered", "attention.widow=4"],
    )
    assert kept[0] == 0, kept[2]
    assert "method: thirds" in kept[1]
    assert "block: 16" in kept[1]
    assert (plan[0], tempered[0]) == (0, 0), plan[2] + tempered[2]
    assert "thirds" in plan[1]
    assert plan[1] != dense[1]
    mapping = json.loads(schema[1])["properties"]["attention"]
    listed = json.dumps(mapping)
    assert "ThirdsConfig" in listed
    assert "TemperedConfig" in listed
    assert unknown[0] == 2
    assert "did you mean thirds?" in unknown[2]
    assert field[0] == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gone", "comes from the package no-good 2.0, which cannot be used: ModuleNotFoundError: No module named"),
        ("leaves", "comes from the package no-good 2.0, which cannot be used: SystemExit: 5. Repair or reinstall"),
        ("number", "not a subclass of sparsetrain.methods.base.MethodConfig"),
        ("other", "its entry point is named other, but ThirdsConfig.method is 'thirds'"),
        ("partial", "PartialConfig defines a method but lacks build, costs"),
        ("twice", "is provided by no-good 2.0 and by rival 3.0; uninstall all of them but one"),
        ("sliding", "is a method of sparsetrain, but no-good 2.0 uses the same name; uninstall the package"),
    ],
)
def test_a_package_that_cannot_be_used_is_named(refusals, method, message):
    code, out, err = refusals[method]
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


@pytest.fixture(scope="module")
def refusals(environment) -> dict:
    names = ("gone", "leaves", "number", "other", "partial", "twice", "sliding", "power")
    commands = [["recipe", "validate", "quickstart", f"attention.method={name}"] for name in names]
    return dict(zip(names, environment.commands(*commands), strict=True))


def test_a_package_that_cannot_be_used_stops_nothing_else(refusals):
    assert refusals["power"][0] == 0


def test_doctor_lists_every_installed_method(environment):
    found = environment.results(DOCTOR)
    assert [text for status, text in found if status == "ok"] == [
        *(f"attention.method={name} comes from every-third 0.1" for name in ("tempered", "thirds")),
        "task=echoes comes from echoes 0.1",
    ]
    assert len([status for status, _ in found if status == "warn"]) == 7 + 6


def test_an_installed_task_is_measured_in_a_run_and_by_the_command(environment, runs, tmp_path):
    folder, *_ = runs["thirds"]
    measured = json.loads((folder / "evaluation.json").read_text())["thirds, after"]["tasks"]["echoes"]
    assert measured["tokens"] == 32
    assert "## Echoes" in (folder / "report.md").read_text()
    again, help_, schema, mistake = environment.commands(
        ["eval", str(folder / "final"), "quickstart", ECHOES, "--output", str(tmp_path / "result.json")],
        ["eval", "--help"],
        ["recipe", "schema"],
        ["recipe", "validate", "quickstart", "eval.tasks=[{task: echoes, lenght: 3}]"],
    )
    assert again[0] == 0, again[2]
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"].values()
    assert row["tasks"]["echoes"] == measured
    assert "perplexity, passkey, recall" in help_[1]
    assert "echoes (echoes 0.1)" in " ".join(help_[1].split())
    assert "EchoesSection" in json.loads(schema[1])["$defs"]
    assert mistake[0] == 2
    assert "eval.tasks.echoes.lenght: unknown key; did you mean eval.tasks.echoes.length?" in mistake[2]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("absent", "task=absent comes from the package no-good 2.0, which cannot be used: ModuleNotFoundError"),
        ("failing", "which cannot be used: SystemExit: 5. Repair or reinstall the package, or choose another"),
        ("method", "is not a subclass of sparsetrain.evaluation.base.TaskSection"),
        ("renamed", "its entry point is named renamed, but EchoesSection.task is 'echoes'; they must be equal"),
        ("shared", "is provided by no-good 2.0 and by rival 3.0; uninstall all of them but one"),
        ("recall", "is an evaluation task of sparsetrain, but no-good 2.0 uses the same name; uninstall the"),
        ("echo", "there is no 'echo'; did you mean echoes?"),
    ],
)
def test_a_package_whose_task_cannot_be_used_is_named(task_refusals, task, message):
    code, out, err = task_refusals[task]
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


@pytest.fixture(scope="module")
def task_refusals(environment) -> dict:
    names = ("absent", "failing", "method", "renamed", "shared", "recall", "echo")
    commands = [["recipe", "validate", "quickstart", f"eval.tasks=[{{task: {name}}}]"] for name in names]
    return dict(zip(names, environment.commands(*commands), strict=True))
