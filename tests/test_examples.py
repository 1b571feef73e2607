"""The scripts of ``examples/`` run as they are called, shortened, and the cells of its notebooks one after another."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from sparsetrain.recipe.shipped import shipped_recipes

pytestmark = pytest.mark.usefixtures("drafted")
EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = Path(__file__).parents[1] / "sparsetrain/assets/tiny"
SHORT = [
    *("train.steps=1", "train.micro_batch=1", "sequence.length=256", "wandb.mode=disabled"),
    *("eval.at_start=false", "eval.at_end=false"),
]
"""Settings for the runs of scripts."""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(script, *arguments)``: run it in an empty folder; its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code: object = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        assert not code, said.err
        return said.out

    return run


@pytest.mark.parametrize(
    ("script", "run"),
    [("books.py", "runs/books"), ("chat_with_tools.py", "runs/chat"), ("dpo.py", "runs/tiny-dpo")],
)
def test_a_script_trains_a_model(call, script, run):
    call(script, *SHORT)
    assert Path(run, "final/model.safetensors").is_file()


def test_scorers_are_trained_alone_and_generate(call):
    texts = "data.sources=[{synthetic: passkey, lengths: [200]}]"
    assert "def add(a, b):" in call("sparsek_scorers.py", *SHORT, texts)


def test_policies_write_beside_all_keys(call):
    lines = call("decode_policies.py").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["all keys", "Twilight, 90 % of the weight", "Quest, 128 keys"]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("trainer.py", ["0"], "steps: a whole number above 0, not 0"),
        ("trainer.py", ["-1"], "steps: a whole number above 0, not -1"),
        ("trainer.py", ["1.5"], "invalid int value: '1.5'"),
        ("sft_trainer.py", ["0"], "steps: a whole number above 0, not 0"),
        ("decode_policies.py", [str(TINY), "gone.txt"], "No such file or directory: 'gone.txt'"),
        ("decode_policies.py", [str(TINY), "empty.txt"], "empty.txt is empty"),
        ("decode_policies.py", ["./gone"], "./gone"),
        ("decode_policies.py", [str(TINY), "a", "b"], "unrecognized arguments: b"),
        ("books.py", ["gone/*.txt"], "no file matches gone/*.txt"),
        ("dpo.py", ["0"], "expected key=value, such as train.lr=2e-5"),
    ],
)
def test_wrong_arguments_of_a_script_are_told(call, script, arguments, said):
    Path("empty.txt").touch()
    with pytest.raises(AssertionError, match=re.escape(said)):
        call(script, *arguments)


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_the_cells_of_a_notebook_run_and_are_kept_without_outputs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    if notebook.stem == "first_steps":
        assert names["losses"][-1] < names["losses"][0]
    else:
        assert names["kept"]["power"] != names["kept"]["sliding"]
        assert names["densities"]["power"][8192] < names["densities"]["power"][512]


def test_every_script_is_described_and_names_a_recipe_that_ships():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f"`{file.name}`" in page
    assert {"quickstart", "tiny-sparsek"} <= shipped_recipes().keys()


@pytest.mark.parametrize("script", ["trainer.py", "sft_trainer.py"])
def test_a_number_of_steps_that_is_none_is_refused_in_words_before_libraries_are_loaded(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    monkeypatch.setattr(sys, "argv", [script, "abc"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / script))
    assert "argument steps: invalid int value: 'abc'" in capsys.readouterr().err
