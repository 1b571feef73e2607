"""Match untrusted regular expressions against names within a time limit."""

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
"""Maximum number of characters of an expression."""

PATIENCE = 2.0
"""Time limit in seconds for matching an expression against all names; most take a millisecond."""

_MEMORY = 2**30
_CHILD = Path(__file__).with_name("match_child.py")


def check_expression(expression: str) -> None:
    """Check that a string is a valid regular expression of ``re``.

    Raises:
        ValueError: It is not; gives the reason.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"{_shown(expression)} is longer than {LONGEST} characters; list the names instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except re.error as error:
        raise ValueError(f"{_shown(expression)} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError):
        raise ValueError(f"{_shown(expression)} is nested or repeated too deeply for a regular expression") from None


def matching(expression: str, names: Collection[str]) -> set[str]:
    """The ``names`` that an expression fully matches, with a time limit of :data:`PATIENCE` seconds.

    Raises:
        ValueError: It is not a regular expression, or takes too long (catastrophic backtracking, as in ``(a+)+b``).
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
            "of the layers; avoid nested repetition such as (a+)+, or list the names"
        )
    return tuple(json.loads(child.stdout))


def _shown(expression: str) -> str:
    return repr(expression) if len(expression) <= 200 else f"{expression[:200]!r}..."
