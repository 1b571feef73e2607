"""A rank that dies, stops, hangs or fails: the other one ends within the timeout and says which it was, and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "faulty_ranks.py"
TIMEOUT = 9.0
GRACE = 3.0
"""Seconds that a stuck main thread is given, in :mod:`sparsetrain.training.supervision.watch`."""
SLACK = 8.0
"""Seconds for the ticks of the watch, on a machine that does other things too."""


@pytest.fixture(scope="module")
def ends(tiny, shared):
    """``ends(fault)``: how the two ranks of a run with that fault ended, in ``ends.folder``."""

    def make(folder):
        done = subprocess.run([sys.executable, str(SCRIPT), str(tiny), str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    folder = shared("faults-of-ranks", make)

    def read(fault):
        found = json.loads((folder / f"{fault}.json").read_text())
        return [(found["codes"][rank], found["seconds"][rank], found["said"][rank]) for rank in "01"]

    read.folder = folder
    return read


def error_of(rank, said):
    """The one message of a rank."""
    (message,) = re.findall(rf"^error \(rank {rank}\): (.*)$", said, flags=re.MULTILINE)
    return message


@pytest.mark.parametrize(("fault", "victim"), [("killed", 1), ("first-killed", 0)])
def test_the_death_of_a_rank_is_told_at_once(ends, fault, victim):
    other = 1 - victim
    code, _, said = ends(fault)[victim]
    assert code == -9, said
    code, seconds, said = ends(fault)[other]
    assert code == 3
    assert seconds < TIMEOUT
    assert re.match(rf"rank {victim} \(host \S+\) died; it was last seen in .*dmesg", error_of(other, said))
    assert "Traceback" not in said


def test_a_stopped_process_is_noticed_by_its_silence(ends):
    code, seconds, said = ends("stopped")[1]
    assert code == 3
    assert TIMEOUT < seconds < TIMEOUT + GRACE + SLACK
    assert re.match(r"rank 0 \(host \S+\) has not answered for 0\.15 minutes", error_of(1, said))


@pytest.mark.parametrize(
    ("fault", "victim", "place"), [("hanging-data", 1, "waiting for data"), ("hanging-forward", 0, "forward")]
)
def test_a_rank_that_hangs_is_told_from_the_one_that_waits_for_it(ends, fault, victim, place):
    for rank, (code, seconds, said) in enumerate(ends(fault)):
        assert code == 3
        assert TIMEOUT < seconds < TIMEOUT + 2 * GRACE + SLACK
        message = error_of(rank, said)
        assert re.match(
            rf"rank {victim} \(host \S+\) made no progress for 0\.15 minutes .*in step 3, {place}, and the", message
        )
    _, _, said = ends(fault)[victim]
    assert "sleep_for_ever" in said.partition("itself was here")[2]


def test_progress_in_a_long_evaluation_is_no_hang(ends):
    for code, _, said in ends("slow-evaluation"):
        assert code == 0, said


def test_an_error_on_one_rank_is_told_by_the_other(ends):
    (code, seconds, said), (failed, _, trace) = ends("raising")
    assert (code, failed) == (3, 1)
    assert seconds < TIMEOUT
    assert re.match(
        r"rank 1 \(host \S+\) failed \(step 3, waiting for data\): RuntimeError: a broken thing$", error_of(0, said)
    )
    assert "RuntimeError: a broken" in trace


def test_an_error_on_one_rank_leaves_all_of_them_the_time_to_write_their_checkpoint(ends):
    assert [code for code, _, _ in ends("raising-while-saving")] == [3, 1]
    checkpoints = ends.folder / "raising-while-saving/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000002"]
    assert (checkpoints / "step-000002/manifest.json").exists()


def test_out_of_memory_on_one_rank_is_explained_by_both(ends):
    (code, seconds, told), (failed, _, said) = ends("out-of-memory")
    assert (code, failed) == (3, 3)
    assert seconds < TIMEOUT
    message = error_of(1, said)
    assert message.startswith("out of memory in step 3, forward")
    assert "the peak of this process was" in message
    assert "1 row of 256 tokens" in message
    assert message.partition("What would help most: ")[2].partition(". ")[0].count(";") == 2
    assert re.match(r"rank 1 \(host \S+\) failed: ", error_of(0, told))
    assert message in told
    assert "Traceback" not in told + said
