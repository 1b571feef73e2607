"""What every test may use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

# Before any kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One thread a worker: the suite runs in several processes, and results must not depend on how work is split.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-seconds", type=float, default=2.0, help="time for each test that tries made-up input (default: 2)"
    )


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[[Any, Callable[[Any], None]], None]:
    """Try a check on values of a strategy of hypothesis for ``--fuzz-seconds``, the same values in every run.

    A value that the check fails on, or that takes more than ten seconds, is made small and shown.
    """
    from hypothesis import HealthCheck, given, seed, settings

    def search(strategy: Any, check: Callable[[Any], None]) -> None:
        end, rounds = time.monotonic() + request.config.getoption("--fuzz-seconds"), 0
        while rounds == 0 or time.monotonic() < end:

            @seed(rounds)
            @settings(
                max_examples=40, deadline=timedelta(seconds=10), database=None, suppress_health_check=list(HealthCheck)
            )
            @given(strategy)
            def attempt(value: Any) -> None:
                check(value)

            attempt()
            rounds += 1

    return search


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised data of the tests goes to a folder of their own."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


@pytest.fixture(autouse=True)
def _no_traces_in_the_environment() -> Iterator[None]:
    """A process group or a W&B service that a test starts in this process is none of the processes of the next."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real text, tokenizers and tiny checkpoints that are not ours to ship."""
    folder = os.environ.get("SPARSETRAIN_TEST_DATA")
    if not folder:
        pytest.skip("SPARSETRAIN_TEST_DATA is not set: it names a folder of tokenizers and real text")
    return Path(folder)
