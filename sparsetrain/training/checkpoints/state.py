"""The state of a run besides the engine's, and the random state of each rank."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparsetrain.errors import first_line
from sparsetrain.training.checkpoints.schema import RandomState


@dataclass
class TrainState:
    """The state of a run: serialisable as JSON, and equal on every rank."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens processed (rows have no padding)."""
    ranks: int = 1
    """Number of ranks of the run that wrote the checkpoint."""
    rows_per_step: int = 0
    """Rows of the global batch, which must stay the same on another number of ranks."""
    steps: int = 0
    """Planned number of steps of the whole run."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the stream of training rows."""
    wandb_run_id: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed when the run was resumed: ``step``, ``key``, ``before`` and ``after`` of each."""


def random_state() -> dict[str, Any]:
    """The random state of this process (Python, numpy, torch, its CUDA device), as JSON."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(words).tolist(), position, has_gauss, gauss],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().numpy()).hex()
    return state


def set_random_state(state: RandomState) -> None:
    """Restore a state returned by :func:`random_state`.

    Raises:
        ValueError: A generator does not accept it.
    """
    version, words, gauss = state.python
    name, numbers, position, has_gauss, gaussian = state.numpy
    try:
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((name, np.array(numbers, dtype=np.uint32), position, has_gauss, gaussian))
        torch.set_rng_state(_bytes(state.torch))
        if state.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(state.cuda))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the random state is invalid ({first_line(error)})") from error


def draw_random_state(seed: int, step: int, rank: int) -> None:
    """Seed the generators of a rank that the checkpoint has no state for; different for every step and rank."""
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)  # the CUDA devices too


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
