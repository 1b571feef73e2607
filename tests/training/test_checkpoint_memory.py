"""What a container leaves a process, and the copy of the state for a checkpoint, made only where there is room."""

from __future__ import annotations

import psutil
import pytest

from sparsetrain.cli import main
from sparsetrain.training.checkpoints import saver
from sparsetrain.training.memory import host as host_memory
from sparsetrain.training.memory.host import ControlGroup, allowed_host_memory, available_host_memory


@pytest.fixture
def container(tmp_path, monkeypatch):
    """``container(limit, use)``: what the kernel says there, with 30 bytes of files and 10 of shared memory."""

    def write(limit, use):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{use}\n")
        (tmp_path / "memory.stat").write_text("anon 5\nfile 30\nshmem 10\n")
        group = ControlGroup(tmp_path, "memory.max", "memory.current", "file", "shmem")
        monkeypatch.setattr(host_memory, "CONTROL_GROUPS", (group,))

    return write


def test_a_container_counts_its_limit_and_gives_files_back(container, tmp_path):
    container(1000, 900)
    assert available_host_memory() == 1000 - 900 + 30 - 10
    assert allowed_host_memory() == 1000
    container("max", 900)
    assert allowed_host_memory() >= psutil.virtual_memory().total
    assert available_host_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").unlink()
    assert available_host_memory() > 1000


def test_without_room_for_a_copy_training_waits(tmp_path, tiny, run_folder, container, monkeypatch, capfd):
    write, threads = saver.Saver._write_part, []
    monkeypatch.setattr(
        saver.Saver,
        "_write_part",
        lambda self, pending, *rest: threads.append(pending.thread) or write(self, pending, *rest),
    )
    run = run_folder(tmp_path / "run")
    arguments = ["run", str(tiny), "checkpoint.every=1", "train.steps=3", "checkpoint.keep_last=3"]
    container(10**6, 10**6 - 400_000)  # of which 80 % are less than 43,168 x 12 bytes
    assert main([*arguments, "--output", str(run.path)]) == 0
    assert threads == [None, None, None]
    assert "".join(capfd.readouterr()).count("host memory has no room for a copy of the state") == 2
    assert run.checkpoints == ["step-000001", "step-000002", "step-000003"]
