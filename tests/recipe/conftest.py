from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.errors import RecipeError
from sparsetrain.recipe import LoadedRecipe, load_recipe

MINIMAL = """\
model: {path: some/model}
attention: {method: power, block: 16, window: 3}
data:
  sources:
    - path: corpus.jsonl
sequence: {length: 128}
train:
  steps: 30
  lr: 2e-5
"""


@pytest.fixture
def minimal() -> str:
    """The shortest valid recipe: every key on a line of its own that the tests refer to."""
    return MINIMAL


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file beside the others of this test."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedRecipe]:
    """Load a recipe from text, with overrides."""

    def load_text(text: str, *overrides: str) -> LoadedRecipe:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load_text


@pytest.fixture
def refuse(load: Callable[..., LoadedRecipe]) -> Callable[..., str]:
    """The message with which a recipe is refused."""

    def message(text: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as refused:
            load(text, *overrides)
        return str(refused.value)

    return message


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of an experiment are processes that have the libraries already; on CUDA, new ones."""
    import torch
    from training.preloaded import forked_run

    if not torch.cuda.is_available():
        monkeypatch.setattr("sparsetrain.recipes.evidence.run.subprocess.run", forked_run)
