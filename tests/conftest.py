"""What every test may use."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The suite sees the same wherever it is started: in a job of Slurm, with a login to W&B, with a cache of models.
for name in [*os.environ]:
    if name in RANKS or name.startswith(("SLURM_", "WANDB_", "HF_", "TRANSFORMERS_", "DS_", "SPARSETRAIN_TRACEBACK")):
        del os.environ[name]
# Before the libraries are imported that read it then. What tests tokenise goes to a folder of their own.
os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="sparsetrain-tests-"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# One thread a process: several run at once, tiny tensors gain nothing, and results depend on how work is split.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

# Before any kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from fast_interpreter import speed_up

    speed_up()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What tests import stays, so that a look through all of it for garbage, half a second, would find none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton complains of what is left at the end
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


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


@pytest.fixture(autouse=True)
def _no_traces_in_the_environment() -> Iterator[None]:
    """A process group or a W&B service that a test starts in this process is none of the processes of the next."""
    names = (*RANKS, "WANDB_SERVICE")
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


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``shared(name, make)``: a folder that ``make`` fills once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fetch(name: str, make: Callable[[Path], None]) -> Path:
        folder = base / name
        with FileLock(base / f"{name}.lock"):
            if not (folder / "made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a test that failed here left half made
                folder.mkdir()
                make(folder)
                (folder / "made").touch()
        return folder

    return fetch


@pytest.fixture
def drafted() -> Iterator[None]:
    """Pictures of runs in this process are drawn, but not laid out and rendered, which takes longer than steps."""
    from training import drafts

    drafts.draw_drafts()
    yield
    drafts.draw_in_full()
