"""``sparsetrain bench step`` on a CPU: a tiny model, both kinds of attention, files, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sparsetrain.bench.step import run_step
from sparsetrain.errors import BenchError


def test_steps_of_dense_and_sparse_attention_are_timed_and_written(tmp_path: Path, capsys) -> None:
    rows = run_step(shape="tiny", lengths="600", attentions="sdpa,power", output=tmp_path)
    assert [row.attention for row in rows] == ["sdpa", "power"]
    assert all(row.ms > 0 and row.tokens_per_second == 600e3 / row.ms and not row.reason for row in rows)
    assert "tokens/s" in capsys.readouterr().out
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["shape"] == "tiny"
    assert [row["ms"] for row in written["rows"]] == [row.ms for row in rows]
    assert len(list(csv.DictReader((tmp_path / "step.csv").open()))) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": "huge"}, "--shape huge: .*llama-3.2-1b"),
        ({"attentions": "sdpa,flash"}, "--attentions flash: .*sliding"),
        ({"lengths": "many"}, "--lengths many"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(BenchError, match=named):
        run_step(**{"shape": "tiny", "lengths": "64", "attentions": "sdpa", "output": None, **options})
