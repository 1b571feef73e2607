"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before any kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One thread a worker: the suite runs in several processes, and results must not depend on how work is split.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised data of the tests goes to a folder of their own."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real text, tokenizers and tiny checkpoints that are not ours to ship."""
    folder = os.environ.get("SPARSETRAIN_TEST_DATA")
    if not folder:
        pytest.skip("SPARSETRAIN_TEST_DATA is not set: it names a folder of tokenizers and real text")
    return Path(folder)
