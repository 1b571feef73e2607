"""Errors for users. Each has one readable message; the command line prints it and exits with an error code."""

from __future__ import annotations


class SparsetrainError(Exception):
    """A mistake in the input or a fault of the machine, explained. Messages name the field, the value and the fix."""

    exit_code = 2


class RecipeError(SparsetrainError):
    """The recipe (file or override) is not valid."""


class ModelError(SparsetrainError):
    """The model cannot be loaded, or does not support the attention method."""


class DataError(SparsetrainError):
    """A data source is missing, empty or malformed."""


class DataMemoryError(DataError):
    """Memory ran out while data was read."""

    exit_code = 3


class CheckpointError(SparsetrainError):
    """A checkpoint or run folder is missing, incomplete or belongs to another run."""


class TrainingError(SparsetrainError):
    """The run cannot go on: a non-finite loss, a failed self-check, a lost rank."""

    exit_code = 3


class BenchError(SparsetrainError):
    """A benchmark was asked for something that it cannot measure."""


def first_line(error: BaseException) -> str:
    """The message of a library's error, without an appended stack trace; its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
