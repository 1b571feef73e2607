"""A rank that ends before the ranks watch one another."""

from __future__ import annotations

import pytest

SCRIPT = """
import os, sys
from sparsetrain.cli import main
from sparsetrain.training.supervision import watch

if os.environ["RANK"] == sys.argv[1]:
    watch.Watch._connect = lambda self: os._exit(9)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_lost_while_they_meet_is_no_traceback(tmp_path, tiny, ranks_of, victim):
    command = ["run", str(tiny), "--output", str(tmp_path / "run")]
    ranks = ranks_of(["-c", SCRIPT, str(victim), *command], tmp_path / "log", 2)
    said = ranks.wait(*(9 if rank == victim else 3 for rank in range(2)))
    assert f"rank {1 - victim} " in said
    # It may be gone before the other has read that all are connected.
    assert "lost another rank while connecting" in said or "could not connect to the others" in said
    assert "Traceback" not in said
