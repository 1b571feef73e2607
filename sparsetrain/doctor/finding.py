"""What a check of this machine has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The finding of a check."""

    status: Literal["ok", "warn", "fail"]
    check: str
    found: str
    fix: str = ""


def gib(size: float) -> str:
    """A number of bytes, such as ``1.5 GiB``."""
    return f"{size / 2**30:,.1f} GiB"
