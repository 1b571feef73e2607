"""``sparsetrain bench scaling``: numbers of ranks beside one another, and what a recorded step says of waiting."""

from __future__ import annotations

import json
from subprocess import CompletedProcess

import pytest

from sparsetrain.bench import scaling
from sparsetrain.bench.recorded import summarise
from sparsetrain.cli import main


@pytest.fixture
def started(monkeypatch):
    """The launches of ``bench step``, each run in this process on one rank; one of 3 ranks ends early at 96 tokens."""
    seen = []

    def run(command, **_):
        ranks = int(command[command.index("--nproc-per-node") + 1])
        words = command[command.index("sparsetrain.cli") + 1 :]
        seen.append((ranks, words))
        words = ["sequence.parallel=1" if word == f"sequence.parallel={ranks}" else word for word in words]
        if ranks == 3:
            words[words.index("--lengths") + 1] = "64"
        return CompletedProcess(command, main(words))

    monkeypatch.setattr(scaling.subprocess, "run", run)
    return seen


def test_every_number_of_ranks_takes_the_same_steps_and_is_compared_with_the_fewest(started, tmp_path, capsys):
    given = ["tiny-sparsek", "lora.rank=4", "--ranks", "1,3", "--lengths", "64,96", "--full-up-to", "64"]
    assert main(["bench", "scaling", *given, "--repeats", "1", "--output", str(tmp_path)]) == 0
    assert [ranks for ranks, _ in started] == [1, 3], "one launch for all lengths"
    for ranks, words in started:
        assert words[:3] == ["bench", "step", "tiny-sparsek"]
        assert "lora.rank=4" in words
        assert f"sequence.parallel={ranks}" in words
        assert "train.global_batch_sequences=1" in words
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["length"], row["ranks"], row["attention"]) for row in rows] == [
        (length, ranks, attention) for length in (64, 96) for attention in ("sparsek", "full") for ranks in (1, 3)
    ]
    one, three, full, full_on_three, long_one, long_three, left_out, _ = rows
    assert one["tokens_per_second"] == pytest.approx(64 / one["seconds"])
    assert three["loss"] == one["loss"] > 0
    assert (three["loss_differs"], three["norm_differs"]) == (0, 0)
    assert three["efficiency"] == pytest.approx(three["tokens_per_second"] / 3 / one["tokens_per_second"])
    assert full["loss"] != one["loss"]
    assert full_on_three["loss_differs"] == 0
    assert long_one["seconds"] > 0
    assert "the 3 ranks ended before" in long_three["reason"]
    assert "--full-up-to 64" in left_out["reason"]
    assert "loss differs" in capsys.readouterr().out
    assert json.loads((tmp_path / "ranks-1" / "step.json").read_text())["rows"][0]["seconds"] == one["seconds"]


def test_numbers_of_ranks_that_mean_nothing_are_refused(capsys):
    assert main(["bench", "scaling", "tiny-sparsek", "--ranks", "1,many"]) == 2
    assert "--ranks 1,many must be numbers of ranks" in capsys.readouterr().err


def test_a_rank_waits_while_collectives_run_and_nothing_is_computed():
    busy = summarise(
        [
            ("gemm", 0.0, 4e6),
            ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 3e6, 6e6),
            ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 5e6, 7e6),
            ("Memcpy DtoH (Device -> Pinned)", 6e6, 8e6),
            ("gemm", 9e6, 10e6),
        ]
    )
    assert busy is not None
    assert (busy.exchange, busy.waiting, busy.copying, busy.total) == (3, 3, 2, 10)
    assert busy.idle == 2, "from 7 to 9 s, of which a copy takes one"
    assert summarise([]) is None
