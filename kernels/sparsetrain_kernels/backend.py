"""Which implementation of an operation runs: decided here, once, and never by catching an error."""

from __future__ import annotations

import torch

BACKENDS = ("auto", "reference")


def choose_backend(backend: str, tensor: torch.Tensor) -> str:
    """The implementation for ``backend`` on the device of ``tensor``: today always ``"reference"`` (plain PyTorch).

    Raises:
        ValueError: the backend does not exist, or not for this device.
    """
    if backend == "triton":
        raise ValueError(
            f"backend='triton' was asked for (tensors on {tensor.device}), but this version has no Triton kernels; "
            "use backend='auto' or 'reference'"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return "reference"
