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
SHORT += ["data.sources=[{synthetic: passkey, lengths: [128]}]", "wandb.mode=disabled"]
THIRDS = "attention={method: thirds, block: 16}"
ECHOES = "eval.tasks=[{task: echoes, length: 32}]"
TEMPERED = "attention={method: tempered, window: 48}"

BROKEN = """
[sparsetrain.methods]
gone = no_such_module:Config
leaves = leaves:Config
number = thirds:__doc__
other = thirds:ThirdsConfig
partial = partial:PartialConfig
sliding = thirds:ThirdsConfig
twice = thirds:ThirdsConfig
[sparsetrain.tasks]
absent = no_such_module:Section
failing = leaves:Section
method = thirds:ThirdsConfig
recall = echoes:EchoesSection
renamed = echoes:EchoesSection
shared = echoes:EchoesSection
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
PROGRAM = """
import contextlib, io, json, sys, torch, sparsetrain
from sparsetrain.cli import main
from sparsetrain.doctor.installation import check_packages

def answer(command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as left:
            code = left.code
    return code, out.getvalue(), err.getvalue()

def generate(folder):
    model = sparsetrain.load(folder).eval()
    ids = torch.arange(5, 65)[None]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    again = ids
    for _ in range(6):
        again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return model.config.sparsetrain, found.tolist() == again.tolist()

found = {name: answer(command) for name, command in json.load(open(sys.argv[1])).items()}
found["generated"] = [generate(folder) for folder in sys.argv[3:]]
found["doctor"] = [(finding.status, finding.found) for finding in check_packages()]
json.dump(found, open(sys.argv[2], "w"))
"""
METHODS = ("gone", "leaves", "number", "other", "partial", "twice", "sliding", "power")
TASKS = ("absent", "failing", "method", "renamed", "shared", "recall", "echo")


def make_environment(folder: Path) -> Path:
    """A virtual environment that borrows the packages of this one, with the packages of the pages, and one of which
    nothing can be used; its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    own = next((folder / "lib").glob("python*/site-packages"))
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (own / "borrowed.pth").write_text("".join(lines))
    sources = []
    for package, page in PAGES.items():
        source = folder / "sources" / package
        source.mkdir(parents=True)
        content = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", content, re.DOTALL):
            (source / name).write_text(text)
        sources.append(source)
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", *options, *sources]
    subprocess.run(pip, check=True, cwd=ROOT.parent)
    (own / "leaves.py").write_text("import sys\nsys.exit(5)\n")
    (own / "partial.py").write_text(PARTIAL)
    for name, version, entries in (("no-good", "2.0", BROKEN), ("rival", "3.0", RIVAL)):
        about = own / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "entry_points.txt").write_text(entries)
    return folder / "bin/python"


@pytest.fixture(scope="session")
def answers(shared) -> dict:
    """What commands of the environment said, all of them in one process: exit code, output and errors by name."""

    def make(folder: Path) -> None:
        python = make_environment(folder / "environment")
        run = ["run", "quickstart", *SHORT, ECHOES]
        plan = ["plan", "qwen3-8b-power-128k"]
        validate = ["recipe", "validate", "quickstart"]
        commands = {
            "thirds": [*run, THIRDS, "deepspeed.stage=2", f"output={folder}/thirds"],
            "tempered": [*run, TEMPERED, "deepspeed.stage=3", f"output={folder}/tempered"],
            "eval": ["eval", f"{folder}/thirds/final", "quickstart", ECHOES, "--output", f"{folder}/result.json"],
            "eval help": ["eval", "--help"],
            "show": ["recipe", "show", f"{folder}/thirds/recipe.yaml"],
            "plan thirds": [*plan, "attention.method=thirds"],
            "plan tempered": [*plan, "attention.method=tempered", "train.parameters=new_modules"],
            "plan full": [*plan, "attention.method=full"],
            "schema": ["recipe", "schema"],
            "unknown method": [*validate, "attention.method=third"],
            "unknown field": [*validate, "attention.method=tempered", "attention.widow=4"],
            "unknown task field": [*validate, "eval.tasks=[{task: echoes, lenght: 3}]"],
            **{f"method {name}": [*validate, f"attention.method={name}"] for name in METHODS},
            **{f"task {name}": [*validate, f"eval.tasks=[{{task: {name}}}]"] for name in TASKS},
        }
        (folder / "commands.json").write_text(json.dumps(commands))
        arguments = [
            folder / "commands.json",
            folder / "answers.json",
            folder / "thirds/final",
            folder / "tempered/final",
        ]
        done = subprocess.run([python, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    folder = shared("installed-packages", make)
    return {"folder": folder, **json.loads((folder / "answers.json").read_text())}


@pytest.mark.parametrize("method", ["thirds", "tempered"])
def test_an_installed_method_trains_and_is_checked_against_its_oracle(answers, method):
    code, out, err = answers[method]
    assert code == 0, err
    assert "layer 0 equals its oracle on" in out + err
    assert (answers["folder"] / method / "final/config.json").is_file()


def test_what_a_learned_method_adds_is_trained_and_saved(answers):
    from safetensors.torch import load_file

    factors = [
        tensor
        for name, tensor in load_file(answers["folder"] / "tempered/final/model.safetensors").items()
        if name.endswith("self_attn.temperature.factor")
    ]
    assert factors
    assert all(factor.item() != 1.0 for factor in factors)


def test_a_saved_model_loads_with_its_package_and_generates(answers):
    for record, equal in answers["generated"]:
        assert record["package"] == "every-third 0.1"
        assert equal


def test_without_its_package_a_saved_model_is_refused_by_its_name(answers):
    with pytest.raises(ModelError, match=r"there is no 'thirds'.*was written with the package every-third 0\.1"):
        load(answers["folder"] / "thirds/final")


def test_it_is_planned_described_and_in_the_schema(answers):
    kept, schema, unknown, field = (answers[name] for name in ("show", "schema", "unknown method", "unknown field"))
    plan, tempered, dense = (answers[f"plan {name}"] for name in ("thirds", "tempered", "full"))
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
def test_a_package_that_cannot_be_used_is_named(answers, method, message):
    code, out, err = answers[f"method {method}"]
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_a_package_that_cannot_be_used_stops_nothing_else(answers):
    assert answers["method power"][0] == 0


def test_doctor_lists_every_installed_method(answers):
    found = answers["doctor"]
    assert [text for status, text in found if status == "ok"] == [
        *(f"attention.method={name} comes from every-third 0.1" for name in ("tempered", "thirds")),
        "task=echoes comes from echoes 0.1",
    ]
    assert len([status for status, _ in found if status == "warn"]) == 7 + 6


def test_an_installed_task_is_measured_in_a_run_and_by_the_command(answers):
    folder = answers["folder"]
    measured = json.loads((folder / "thirds/evaluation.json").read_text())["thirds, after"]["tasks"]["echoes"]
    assert measured["tokens"] == 32
    assert "## Echoes" in (folder / "thirds/report.md").read_text()
    again, help_, schema, mistake = (answers[name] for name in ("eval", "eval help", "schema", "unknown task field"))
    assert again[0] == 0, again[2]
    (row,) = json.loads((folder / "result.json").read_text())["rows"].values()
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
def test_a_package_whose_task_cannot_be_used_is_named(answers, task, message):
    code, out, err = answers[f"task {task}"]
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
