"""Turn errors that other libraries raise on a user's values into a :class:`ModelError` with one message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sparsetrain.cache_folder import cache_fault
from sparsetrain.errors import ModelError, SparsetrainError

SEARCH_SECONDS = 3.0
"""Time limit for the search for the value that causes an error, in seconds."""

SPEAKING = (Exception, ValueError, ImportError)
"""Errors whose class name adds nothing to their message."""

_MEMORY_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def explained(what: str | Callable[[BaseException], str], fix: str = "") -> Iterator[None]:
    """Turn any error of a library into a :class:`ModelError` that quotes the library's message.

    Our own errors, interrupts and out-of-memory errors pass unchanged.

    Args:
        what: The start of the message: which action failed, on which file or setting. A function of the error if
            this takes time to find out.
        fix: The end of the message: how to fix it.

    Raises:
        ModelError: For every other error inside.
    """
    try:
        yield
    except BaseException as error:
        if not is_fault(error):
            raise
        begun = what if isinstance(what, str) else what(error)
        known = cache_fault(error)
        raise ModelError(f"{begun}: {known or words(error)}{f' {fix}' if fix and not known else ''}") from error


def is_fault(error: BaseException) -> bool:
    """Whether an error means that a library was given invalid input.

    Panics of libraries written in Rust (tokenizers, safetensors) are not subclasses of ``Exception``.
    """
    if isinstance(error, SparsetrainError | MemoryError | torch.OutOfMemoryError):
        return False
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def words(error: BaseException) -> str:
    """The message of an error in one line, with its class if the message is only a name (as in ``KeyError``)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # transformers puts the reason on the line after "Validation error for field 'hidden_size':".
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if " " in text and (type(error) in SPEAKING or isinstance(error, OSError) or "validation error" in text.lower()):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def faulty_value(values: Mapping[str, Any], build: Callable[[dict[str, Any]], object]) -> str | None:
    """The name of the single value that makes ``build`` raise; None if no single value does."""
    end = time.monotonic() + SEARCH_SECONDS
    for name in values:
        if time.monotonic() > end:
            break
        try:
            build({other: value for other, value in values.items() if other != name})
        except BaseException as error:
            if not isinstance(error, SparsetrainError) and not is_fault(error):
                raise
        else:
            return name
    return None
