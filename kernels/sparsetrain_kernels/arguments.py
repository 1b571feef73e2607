"""What every public operation asks of its arguments before it looks at their values."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

# Concrete types first: torch.compile knows them of sizes that it leaves open, and nothing else about these.
_INTEGERS = (int, torch.SymInt, numbers.Integral)
_NUMBERS = (*_INTEGERS, float, torch.SymFloat, numbers.Real)


def is_integer(value: object) -> bool:
    """Whether it is a whole number by type. ``2.0`` and ``True`` are none."""
    return not isinstance(value, bool) and any(isinstance(value, kind) for kind in _INTEGERS)


def check_tensors(**tensors: object) -> None:
    """Each is a tensor.

    Raises:
        TypeError: one is something else, such as a list or a NumPy array.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")


def check_count(name: str, value: int, least: int, why: str = "", unit: str = "tokens") -> None:
    """A whole number of ``unit``, and at least ``least``.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    if not is_integer(value):
        raise TypeError(f"{name}={value!r} is no integer; expected a number of {unit}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}{why and ': '}{why}")


def check_number(name: str, value: float) -> None:
    """A number.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not any(isinstance(value, kind) for kind in _NUMBERS):
        raise TypeError(f"{name}={value!r} is no number")
