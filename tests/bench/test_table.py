from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.bench import attention
from sparsetrain.bench.attention import AttentionRow, rank
from sparsetrain.bench.case import fill
from sparsetrain.bench.cases import power
from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.picture import STYLES, draw
from sparsetrain.bench.problem import PatternProblem, Tensors
from sparsetrain.bench.table import Report, print_report, write_report

SMALL: dict[str, Any] = {"lengths": "96,160", "heads": 2, "kv_heads": 1, "head_dim": 8, "block": 16, "budget": 1.0}


def fails(error: Exception) -> Any:
    def prepare(problem: PatternProblem, tensors: Tensors) -> Prepared:
        raise error

    return prepare


def wrong(problem: PatternProblem, tensors: Tensors) -> Prepared:
    return Prepared(lambda query, key, value: query * key.mean() * value.mean())


def measured(*more: Contender, **options: Any) -> Report:
    bench = power.case(power.Options(device="cpu", **{**SMALL, **options}))
    bench = replace(bench, contenders=(*bench.contenders, *more))
    report = Report("power", bench.facts(), command="sparsetrain bench power")
    reports = list(fill(report, bench, lambda line: None))
    assert len(reports) == len(bench.lengths)
    return report


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch):
    monkeypatch.setattr(attention, "matmul_tflops", lambda *arguments: 0.5)


@pytest.fixture
def report() -> Report:
    return measured(
        Contender("absent", "absent", "blocks", fails(Unavailable("not installed: pip install it"))),
        Contender("large", "large", "all", fails(torch.OutOfMemoryError("Tried to allocate"))),
        Contender("broken", "broken", "blocks", fails(RuntimeError("\n first line \n second"))),
    )


@pytest.fixture
def disagreeing() -> Report:
    return measured(Contender("wrong", "wrong", "blocks", wrong))


def test_a_failure_is_a_reason_in_its_row_and_stops_nothing_else(report):
    rows = {row.name: row for row in report.rows if row.length == 160}
    assert list(rows) == ["ours", "sdpa", "absent", "large", "broken"]
    assert rows["absent"].reason == "not installed: pip install it"
    assert rows["large"].reason == "out of memory"
    assert rows["broken"].reason == "RuntimeError: first line"
    for name in ("ours", "sdpa"):
        assert rows[name].reason == ""
        assert rows[name].both_ms > 0
        assert rows[name].forward_share == pytest.approx(rows[name].forward_tflops / 0.5)
        assert rows[name].check == "passed"


def test_a_backward_pass_that_fails_leaves_the_forward_time():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

    for check in (True, False):
        inference = Contender(
            "inference", "inference", "blocks", lambda *_: Prepared(lambda q, k, v: NoBackward.apply(q))
        )
        row = measured(inference, lengths="96", check=check).rows[-1]
        assert row.forward_ms > 0
        assert row.forward_tflops > 0
        assert row.both_ms is None
        assert row.reason.startswith("NotImplementedError")


def test_a_wrong_result_is_marked_and_not_ranked(disagreeing):
    rows = [row for row in disagreeing.rows if row.name == "wrong"]
    assert all((row.check, row.rank, row.both_ratio) == ("failed", None, None) for row in rows)
    assert all(row.both_ms > 0 for row in rows)


def test_ours_is_marked_too_where_nobody_agrees_with_it(disagreeing):
    ours = [check for check in disagreeing.checks if check.name == "ours"]
    assert [(check.against, check.passed) for check in ours] == [
        ("fp32 oracle", True),
        ("all others", False),
        ("all others", False),
    ]
    assert {row.check for row in disagreeing.rows if row.name == "ours"} == {"failed"}


def test_without_checks_everything_measured_is_ranked():
    report = measured(check=False)
    assert report.checks == []
    assert sorted(row.rank for row in report.rows if row.length == 96) == [1, 2]
    assert {row.check for row in report.rows} == {"off"}


def test_packed_documents_are_measured():
    report = measured(packed=True, lengths="200")
    assert [row.reason for row in report.rows] == ["", ""]
    assert {row.check for row in report.rows} == {"passed"}


def row(name: str, forward_ms: float | None, both_ms: float | None, check: str = "passed") -> AttentionRow:
    times = {"forward_ms": forward_ms, "both_ms": both_ms}
    return AttentionRow(
        length=1024, name=name, title=name, sparse=True, documents=1, forward_flops=2e9, check=check, **times
    )


def test_rates_ratios_and_ranks_follow_from_the_times():
    rows = [row("ours", 1, 3), row("flex", 2, 9), row("bad", 0.1, 0.2, "failed"), row("none", None, None)]
    for each in rows:
        each.complete(ceiling_tflops=10)
    rank(rows)
    ours, flex, bad, none = rows
    assert (ours.forward_tflops, ours.backward_ms, ours.backward_tflops) == (2, 2, 2.5)
    assert (ours.forward_share, ours.backward_share) == (0.2, 0.25)
    assert (flex.forward_ratio, flex.both_ratio, flex.rank) == (2, 3, 2)
    assert (ours.both_ratio, ours.rank) == (1, 1)
    assert (bad.rank, bad.both_ratio, bad.forward_tflops) == (None, None, 20)
    assert (none.rank, none.forward_tflops) == (None, None)


def test_without_ours_there_are_ranks_but_no_ratios():
    rows = [row("flex", 2, 9), row("cudnn", 1, 3)]
    rank(rows)
    assert [(each.rank, each.both_ratio) for each in rows] == [(2, None), (1, None)]


def test_a_difference_below_zero_is_no_backward_time():
    each = row("ours", 3, 2)
    each.complete(None)
    assert (each.backward_ms, each.backward_tflops, each.forward_share) == (None, None, None)


def test_files_hold_everything_and_the_table_says_why_a_row_is_empty(report, tmp_path):
    table, record = write_report(report, tmp_path / "new/folder")
    with table.open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(int(line["length"]), line["name"]) for line in lines] == [(row.length, row.name) for row in report.rows]
    assert lines[2]["reason"] == "not installed: pip install it"
    assert float(lines[0]["both_ms"]) == report.rows[0].both_ms
    read = json.loads(record.read_text())
    assert read["command"] == "sparsetrain bench power"
    assert read["options"]["lengths"] == [96, 160]
    # What PyPI calls 2.13.0 calls itself 2.13.0+cu130.
    assert torch.__version__.startswith(read["machine"]["versions"]["torch"])
    assert read["rows"][0]["both_ms"] == report.rows[0].both_ms
    assert [check["passed"] for check in read["checks"]] == [True, True, False, False, False]
    assert draw(report, tmp_path / "power.png").stat().st_size > 10_000

    console = Console(record=True, width=80, force_terminal=False)
    print_report(report, console)
    text = console.export_text()
    assert "160 tokens" in text
    assert "absent: not installed: pip install it" in text
    assert "mask ms" not in text  # nothing here has a mask


def test_every_implementation_of_a_machine_has_a_picture_style():
    for device in ("cpu", "cuda"):
        for packed in (False, True):
            bench = power.case(power.Options(device=device, packed=packed))
            assert {each.name for each in bench.contenders} <= set(STYLES)
