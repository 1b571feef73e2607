"""The experiment on a language model: one budget, tasks and text of every method, and where its text comes from."""

from __future__ import annotations

import json
import sys

import pytest
import typer
from sparsetrain.recipes.evidence import language, packages

from sparsetrain.methods.registry import parse_attention
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.shipped import recipes_folder

RECIPE = recipes_folder() / "evidence/language.yaml"


def test_methods_that_choose_keys_read_as_many_as_power():
    methods = language.methods(load_recipe(RECIPE).recipe)
    sparsek, recycled = (parse_attention(methods[name][0]) for name in ("sparsek", "recycled"))
    assert sparsek.sinks + sparsek.topk + sparsek.window == recycled.sinks + recycled.keep + recycled.recent == 1024
    assert parse_attention(methods["power"][0]).pattern(4).max_key_blocks(64) == 8
    assert [name for name in methods if methods[name][1]] == ["sparsek"], "its scorers learn faster"


def test_the_runner_trains_and_tells_facts_and_text(forked, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "DOCUMENTS", 2)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "def f(x):\n    return x\n" * 200}) + "\n")
    source = {"path": str(text)}
    perplexity = {"task": "perplexity", "lengths": [512], "tokens": 1024, "source": source}
    keys = {"task": "key_tokens", "lengths": [512], "tokens": 1024, "short": 64, "stride": 32, "beta": -99, "alpha": -9}
    settings = {
        "model": {"path": "sparsetrain:tiny", "dtype": "float32"},
        "attention": {"method": "power", "block": 16, "window": 1, "sinks": 1},
        "data": {"sources": [source]},
        "sequence": {"length": 512},
        "train": {"steps": 1, "micro_batch": 1, "lr": 1e-4, "warmup": 0},
        "deepspeed": {"stage": 0},
        "eval": {"every": 1, "tasks": [perplexity, keys | {"source": source}]},
        "wandb": {"mode": "disabled"},
    }
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(settings))
    language.main(str(recipe), [], seed=[5], parallel=1, only=["power"], out=tmp_path / "out")
    found = json.loads((tmp_path / "out/table.json").read_text())
    asked = {task: sum(outcomes[0]["asked"]) for task, outcomes in found["facts"].items()}
    assert asked == {"recall": 16, "needles": 2, "passkey": 2}
    assert list(found["text"][0]["points"]) == ["0", "512"]
    assert "| power |" in (tmp_path / "out/table.md").read_text()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder where packages are installed."""
    folder = tmp_path / "site-packages"
    monkeypatch.setattr(sys, "path", [str(folder)])

    def install(name: str, text: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return install


def test_text_of_packages_holds_one_package_out(installed, tmp_path):
    lines = "value = call(value)\n"
    installed("one/a.py", lines * 100)
    installed("one/copy.py", lines * 100)
    installed("one/short.py", lines)
    installed("one/table.py", "x" * 2000)
    installed("two/long.py", lines * 3000)
    installed("two/middle.py", lines * 200)
    packages.write(tmp_path / "out", "two")
    texts = {
        split: [json.loads(row)["text"] for row in (tmp_path / f"out/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    assert texts == {"train": [lines * 100], "validation": [lines * 3000]}


def test_a_package_that_is_not_there_is_refused(installed, tmp_path):
    installed("one/a.py", "value = call(value)\n" * 100)
    with pytest.raises(typer.BadParameter, match="--held-out nothing: no module"):
        packages.write(tmp_path / "out", "nothing")
