"""``sparsetrain bench recycled`` on a CPU: what is checked, and which parts are timed apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsetrain_kernels import causal_attention

from sparsetrain.bench import attention
from sparsetrain.bench.attention import AttentionCase
from sparsetrain.bench.case import fill
from sparsetrain.bench.cases import recycled
from sparsetrain.bench.check import answer, oracle, relative_errors
from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.contenders.recycled import RECYCLED
from sparsetrain.bench.table import Report
from sparsetrain.cli import main

SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "every": 8, "keep": 12, "recent": 4, "sinks": 2}


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch):
    monkeypatch.setattr(attention, "matmul_tflops", lambda *arguments: 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def resolve(**options: Any) -> AttentionCase:
    return recycled.case(recycled.Options(device="cpu", **{**SMALL, **options}))


@pytest.mark.parametrize("every", [5, 8])
def test_ours_is_the_definition_and_dense_attention_is_not(every):
    problem = resolve(every=every).check_problem()
    tensors = problem.tensors()
    want = oracle(problem, tensors, sparse=True)
    assert max(relative_errors(answer(RECYCLED.prepare(problem, tensors), tensors), want)) < 1e-5
    dense = answer(Prepared(lambda query, key, value: causal_attention(query, key, value)), tensors)
    assert max(relative_errors(dense, want)) > 0.1


def test_work_counts_what_rows_read():
    problem = resolve().problem(40)
    pairs = sum(row + 1 if row % 8 == 0 else min(row // 8 * 8 + 1, 12 + 4 + 2) + row % 8 for row in range(40))
    assert problem.flops(sparse=True) == pytest.approx(4 * 8 * pairs * 4)


def test_parts_are_timed_apart_and_what_is_wrong_is_not_ranked():
    def prepare(problem: Any, tensors: Any) -> Prepared:
        return RECYCLED.prepare(replace(problem, keep=1), tensors)

    bench = resolve(lengths="96", budget=1.0)
    again, wrong = replace(RECYCLED, name="again"), Contender("wrong", "wrong", "chosen", prepare, ("cpu",))
    bench = replace(bench, contenders=(*bench.contenders, again, wrong))
    report = Report("recycled", bench.facts())
    assert len(list(fill(report, bench, lambda line: None))) == 1
    rows = {row.name: row for row in report.rows}
    ours = rows["ours"]
    assert [rows[name].check for name in ("ours", "sdpa", "wrong")] == ["passed", "passed", "failed"]
    assert min(ours.full_rows_ms, ours.selection_ms, ours.listed_ms) > 0
    assert (rows["sdpa"].listed_ms, rows["wrong"].both_ratio) == (None, None)


def test_the_command_says_what_it_measures(capsys):
    arguments = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--every", "8", "--keep", "12", "--budget", "1"]
    assert main(["bench", "recycled", *arguments, "--lengths", "96"]) == 0
    shown = capsys.readouterr().out
    assert "these are CPU timings" in shown
    assert "full rows ms" in shown
    assert main(["bench", "recycled", "--every", "0"]) == 2


def test_defaults_are_those_of_the_figures():
    found = recycled.case(recycled.Options(device="cuda"))
    assert found.lengths == (8192, 32768, 131072)
    assert (found.options.every, found.options.keep, found.options.dtype) == (16, 1024, "bfloat16")
    assert [each.name for each in found.contenders] == ["ours", "cudnn", "fa2", "fa4"]
