"""Accelerators by name: memory, FLOP/s of matrix products, memory bandwidth and link bandwidth."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsetrain.errors import RecipeError
from sparsetrain.training.output.flops import peak_flops


@dataclass(frozen=True)
class Device:
    """An accelerator, with values from the vendor's data sheet."""

    name: str
    memory: float
    """Memory in bytes, in decimal units: 80 GB are 80e9."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bandwidth in bytes per second between GPUs of one host: NVLink in one direction, or PCIe."""
    hopper: bool = False
    """Whether it runs our Hopper kernels instead of the portable Triton kernels."""

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of products in ``dtype``, without sparsity."""
        peak = peak_flops(self.name, dtype)
        assert peak is not None, "every device here is in the table of peaks"
        return peak


DEVICES: dict[str, Device] = {
    "h100": Device("H100 80GB", 80e9, 3.35e12, 450e9, hopper=True),
    "h200": Device("H200 141GB", 141e9, 4.8e12, 450e9, hopper=True),
    "b200": Device("B200 180GB", 180e9, 8.0e12, 900e9),
    "a100": Device("A100 80GB", 80e9, 2.04e12, 300e9),
    "a100-40gb": Device("A100 40GB", 40e9, 1.56e12, 300e9),
    "l40s": Device("L40S 48GB", 48e9, 0.864e12, 32e9),
    "4090": Device("RTX 4090 24GB", 24e9, 1.01e12, 32e9),
}
"""The devices that ``--device`` accepts."""


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name.lower() not in DEVICES:
        raise RecipeError(f"--device {name}: there is none of that name; choose from {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


LEAST_MEMORY, MOST_MEMORY = 1e8, 1e14
"""The minimum memory of a GPU in bytes."""


def parse_memory(text: str) -> float:
    """Bytes of ``80GB``, ``141 GB`` or ``79.6GiB``; a bare number counts gigabytes.

    Raises:
        RecipeError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|g)?\s*", text.lower())
    if match is None:
        raise RecipeError(f"--memory {text:.60}: give the memory of one GPU, such as 80GB or 79.6GiB")
    size = float(match[1]) * (2**30 if match[2] == "gib" else 1e9)
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise RecipeError(
            f"--memory {text:.60}: the memory of one GPU is between {LEAST_MEMORY / 1e9:g} GB and "
            f"{MOST_MEMORY / 1e9:,.0f} GB; write it as 80GB or 79.6GiB"
        )
    return size
