"""The errors a user may meet. Each carries one readable message; the command line prints it and exits with code 2."""

from __future__ import annotations


class SparsetrainError(Exception):
    """A mistake in the input or a fault of the machine, explained. Messages name the field, the value and the fix."""

    exit_code = 2


class RecipeError(SparsetrainError):
    """The recipe (file or override) is not valid."""


class ModelError(SparsetrainError):
    """The model cannot be loaded, or cannot take the attention method asked for."""


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
    """What an error of a library says, without the stack that some append; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
