"""Which implementation of an operation runs: decided here, once, and never by catching an error."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from functools import cache

import torch

BACKENDS = ("auto", "gluon", "triton", "reference")

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run on the CPU, one operation at a time: for tests."""
KERNELS_ON_CPU = False
"""Whether ``auto`` takes kernels on a CPU too, in Triton's interpreter. Tests of whole models set it: nothing else runs
a model's kernels without a GPU."""
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_HEAD_DIM = 256
"""The largest that the attention kernels have tiles for."""
GLUON_DTYPES = (torch.float16, torch.bfloat16)
GLUON_HEAD_DIMS = (64, 128)
TESTED_GLUON = ((3, 6), (3, 9))
"""Oldest and newest Triton whose Gluon, still experimental there, the Hopper kernels were compiled with."""


def choose_backend(backend: str, tensor: torch.Tensor, refusals: Mapping[str, str | None]) -> str:
    """``"gluon"`` (Triton's language for Hopper), ``"triton"`` (plain) or ``"reference"`` (plain PyTorch).

    ``auto`` takes the first of these that can run the call; on a CPU the last, unless :data:`KERNELS_ON_CPU`.

    Args:
        backend: one of :data:`BACKENDS`.
        tensor: any input of the operation.
        refusals: for ``gluon`` and ``triton``, why the operation has no kernel for these arguments, or None.

    Raises:
        ValueError: the backend does not exist, or cannot run this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and not tensor.is_cuda and not KERNELS_ON_CPU):
        return "reference"
    for candidate in ("gluon", "triton") if backend == "auto" else (backend,):
        refusal = refusals[candidate] or _unavailable(candidate, tensor)
        if refusal is None:
            return candidate
    if backend != "auto":
        raise ValueError(f"backend={backend!r} cannot run this: {refusal}; use backend='auto' or 'reference'")
    return "reference"


def triton_refusal(query: torch.Tensor) -> str | None:
    """Why the plain Triton kernels of attention have none for this query, ``[..., head_dim]``, or None."""
    if query.dtype not in TRITON_DTYPES:
        return f"its kernels take fp32, fp16 and bf16, not {query.dtype}"
    if query.shape[-1] > TRITON_HEAD_DIM:
        return f"its kernels take a head_dim of up to {TRITON_HEAD_DIM}, not {query.shape[-1]}"
    return None


def gluon_refusal(query: torch.Tensor) -> str | None:
    """Why the Hopper kernels of attention cannot run this query, ``[..., head_dim]``, or None."""
    if query.dtype not in GLUON_DTYPES:
        return f"its kernels take fp16 and bf16, not {query.dtype}"
    if query.shape[-1] not in GLUON_HEAD_DIMS:
        return f"its kernels take a head_dim of 64 or 128, not {query.shape[-1]}"
    return None


def _unavailable(backend: str, tensor: torch.Tensor) -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if not tensor.is_cuda:
        if backend == "triton" and INTERPRETING:
            return None
        reason = "Gluon has no interpreter" if backend == "gluon" else "TRITON_INTERPRET=1 is not set"
        return f"the tensors are on {tensor.device}, and {reason}"
    capability = _capability(tensor.get_device())
    if backend == "triton" and older_than_ampere(tensor):
        return f"{torch.cuda.get_device_name(tensor.device)} is older than Ampere"
    if backend == "gluon":
        if torch.version.hip is not None or capability != (9, 0):
            return f"its kernels are for Hopper, not {torch.cuda.get_device_name(tensor.device)}"
        if not TESTED_GLUON[0] <= TRITON_VERSION <= TESTED_GLUON[1]:
            tested = " to ".join(".".join(map(str, version)) for version in TESTED_GLUON)
            return f"its kernels were tested with Triton {tested}, not {'.'.join(map(str, TRITON_VERSION))}"
    return None


def older_than_ampere(tensor: torch.Tensor) -> bool:
    """Whether an NVIDIA GPU that holds a tensor, of any shape ``[...]``, is too old for Triton's attention kernels and
    for FlashAttention."""
    return torch.version.hip is None and _capability(tensor.get_device()) < (8, 0)


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _triton_version() -> tuple[int, int]:
    if not TRITON_INSTALLED:
        return (0, 0)
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


TRITON_VERSION = _triton_version()
