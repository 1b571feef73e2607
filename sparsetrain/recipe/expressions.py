"""Regular expressions that others wrote, compared with names in a bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

LONGEST = 2000
"""Characters of an expression."""

PATIENCE = 2.0
"""Seconds for an expression to go through all names; most take a thousandth of one."""

_MEMORY = 2**30
_CHILD = Path(__file__).with_name("match_child.py")


def check_expression(expression: str) -> None:
    """Whether this is a regular expression of ``re``.

    Raises:
        ValueError: it is none; says why.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"{_shown(expression)} is longer than {LONGEST} characters; list the names instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except re.error as error:
        raise ValueError(f"{_shown(expression)} is no regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError):
        raise ValueError(f"{_shown(expression)} is nested or repeated too deeply for a regular expression") from None


def matching(expression: str, names: Collection[str]) -> set[str]:
    """Those of ``names`` that an expression matches as a whole, found in :data:`PATIENCE` seconds or not at all.

    Raises:
        ValueError: it is no expression, or it goes through ever more ways to match, as ``(a+)+b`` does.
    """
    check_expression(expression)
    return set(_matching(expression, tuple(names)))


@lru_cache(maxsize=64)
def _matching(expression: str, names: tuple[str, ...]) -> tuple[str, ...]:
    asked = {"expression": expression, "names": names, "seconds": PATIENCE, "bytes": _MEMORY}
    child = subprocess.run(
        [sys.executable, "-I", "-S", str(_CHILD)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise ValueError(
            f"{_shown(expression)} takes more than {PATIENCE:g} seconds, or too much memory, to compare with the names "
            "of the layers; do not repeat what repeats itself, as (a+)+ does, or list the names"
        )
    return tuple(json.loads(child.stdout))


def _shown(expression: str) -> str:
    return repr(expression) if len(expression) <= 200 else f"{expression[:200]!r}..."
