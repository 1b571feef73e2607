"""What the tests on CUDA devices share: memory that shows what was not written, and for training the fixtures of the
training tests, over a recipe of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from training.conftest import make_corpus, make_recipe, make_tokenizer, pretrained, ranks_of, run_folder

from sparsetrain.recipe.yaml_source import dump_yaml

__all__ = ["pretrained", "ranks_of", "run_folder"]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, or integers that no index may be."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared(shared: Callable[..., Path]) -> Callable[[str, Callable[[Path], None]], Path]:
    """As for all tests; those of training make folders of the same names from another recipe."""
    return lambda name, make: shared(f"cuda-{name}", make)


@pytest.fixture(scope="session")
def tiny(shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The tiny recipe with rows, heads and blocks for which there are kernels, Hopper's too, in bf16."""

    def make(folder: Path) -> None:
        make_tokenizer(folder / "tokenizer")
        make_corpus(folder / "corpus.jsonl")
        recipe = make_recipe(folder)
        recipe["model"]["dtype"] = "bfloat16"
        recipe["model"]["architecture"] |= {
            "hidden_size": 256,
            "intermediate_size": 512,
            "max_position_embeddings": 8192,
            "initializer_range": 0.05,
        }
        recipe["attention"]["block"] = 128
        recipe["data"]["sources"][1]["lengths"] = [160, 900]
        recipe["sequence"]["length"] = 1024
        # On top of what is tested it would compile a dozen kernels more.
        recipe["train"]["liger"] = "off"
        recipe["checkpoint"] = {"export": False}
        (folder / "tiny.yaml").write_text(dump_yaml(recipe))

    return shared("tiny-recipe", make) / "tiny.yaml"
