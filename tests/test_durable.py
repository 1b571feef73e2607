"""Files that are written whole or stay what they were."""

from __future__ import annotations

import os

import pytest

from sparsetrain.durable import write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    file = tmp_path / "file"
    write_whole(file, "größer\n")
    assert file.read_text(encoding="utf-8") == "größer\n"
    write_whole(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    assert os.listdir(tmp_path) == ["file"]


def test_interrupted_before_the_end_it_stays_what_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, "before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_whole(file, "after")
    assert error.value.filename == str(file)
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_what_lies_at_the_place_beside_it_is_not_opened(tmp_path):
    file, beside, precious = tmp_path / "file", tmp_path / "file.part", tmp_path / "precious"
    os.mkfifo(beside)
    write_whole(file, "one")
    precious.write_text("kept")
    beside.symlink_to(precious)
    write_whole(file, "two")
    assert (file.read_text(), precious.read_text()) == ("two", "kept")
    beside.mkdir()
    with pytest.raises(OSError, match="it is a folder") as error:
        write_whole(file, "three")
    assert error.value.filename == str(beside)
    assert file.read_text() == "two"
