"""A cache that is full or cannot be written to is named as the cause, not the data that goes through it."""

from __future__ import annotations

import errno

import pytest
from datasets.exceptions import DatasetGenerationError

from sparsetrain.cache_folder import cache_fault


def chained(cause):
    """As ``datasets`` raises it."""
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space there"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some of your quota there"),
        (OSError("Not enough disk space. Needed: 3 GB"), "free some space there"),
        (PermissionError(errno.EACCES, "Permission denied", "{cache}/datasets/x.lock"), "make it writable"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "{cache}"), "make it a folder"),
    ],
)
def test_the_folder_and_the_fix_are_named(tmp_path, monkeypatch, cause, fix):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if cause.filename:
        cause.filename = cause.filename.format(cache=tmp_path)
    said = cache_fault(chained(cause))
    assert f"the cache of models and data in {tmp_path} cannot be written" in said
    assert fix in said
    assert "set HF_HOME" in said


def test_a_data_file_that_may_not_be_read_is_no_fault_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert cache_fault(chained(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x.jsonl")))) is None
    assert cache_fault(ValueError("bad json")) is None
