"""``sparsetrain bench sparsek`` on a CPU: what is measured, checked and reported, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from sparsetrain_kernels import causal_sparsek, sparsek_attention

from sparsetrain.bench import attention
from sparsetrain.bench.attention import AttentionCase, AttentionRow, rank
from sparsetrain.bench.case import fill
from sparsetrain.bench.cases import sparsek
from sparsetrain.bench.cases.sparsek import crossovers
from sparsetrain.bench.check import answer, oracle, relative_errors
from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.contenders.ours import SPARSEK
from sparsetrain.bench.picture import STYLES
from sparsetrain.bench.problem import SparseKProblem, Tensors, select_by_sorting
from sparsetrain.bench.table import Report, print_report
from sparsetrain.cli import main
from sparsetrain.errors import BenchError

SMALL: dict[str, Any] = {"lengths": "96,160", "heads": 4, "kv_heads": 2, "head_dim": 8, "topk": 20, "window": 16}
ARGUMENTS = ("--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--topk", "20", "--window", "16", "--budget", "1")


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch):
    monkeypatch.setattr(attention, "matmul_tflops", lambda *arguments: 0.5)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def resolve(**options: Any) -> AttentionCase:
    return sparsek.case(sparsek.Options(**options))


def row(name: str, length: int = 1024, **times: Any) -> AttentionRow:
    sparse, flops = name == "ours", 2e9
    return AttentionRow(
        length=length, name=name, title=name.upper(), sparse=sparse, documents=1, forward_flops=flops, **times
    )


def measured(*more: Contender, **options: Any) -> Report:
    bench = resolve(device="cpu", budget=1.0, **{**SMALL, **options})
    bench = replace(bench, contenders=(*bench.contenders, *more))
    report = Report("sparsek", bench.facts(), command="sparsetrain bench sparsek")
    assert len(list(fill(report, bench, lambda line: None))) == len(bench.lengths)
    return report


def selecting_otherwise(problem: SparseKProblem, tensors: Tensors) -> Prepared:
    """Half as many keys."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return sparsek_attention(query, key, value, scores, problem.topk // 2, problem.window, problem.sinks)

    return Prepared(attend, select=lambda scores: causal_sparsek(scores, 1, 1).threshold)


@pytest.mark.parametrize("gate", ["value", "log", "straight"])
def test_output_and_all_gradients_agree_with_the_definition(gate):
    problem = resolve(device="cpu", gate=gate, **SMALL).check_problem()
    tensors = problem.tensors()
    got = answer(SPARSEK.prepare(problem, tensors), tensors)
    want = oracle(problem, tensors, sparse=True)
    errors = relative_errors(got, want)
    assert len(errors) == 5
    assert max(errors) < 1e-5
    assert want.scores.norm() > 0


@pytest.mark.parametrize("drift", [False, True])
def test_the_definition_selects_what_the_operation_selects(drift):
    problem = resolve(device="cpu", scores="drift" if drift else "normal", **SMALL).problem(160)
    scores = problem.tensors().scores[0, 0].clone()
    scores[::3] = scores[1::3][: len(scores[::3])].median()  # ties
    scores.requires_grad_()
    threshold, exit = select_by_sorting(scores, problem.topk, problem.window, problem.sinks)
    want = causal_sparsek(scores[None, None], problem.topk, problem.window, sinks=problem.sinks)
    assert torch.equal(exit, want.exit[0, 0])
    torch.testing.assert_close(threshold, want.threshold[0, 0], rtol=0, atol=1e-6)
    weights = torch.randn(160, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(each, scores, weights)[0] for each in (threshold, want.threshold[0, 0])]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_the_checked_problem_leaves_keys_out_and_stays_short():
    for topk, window in ((20, 16), (1024, 1024), (60_000, 4096), (1, 1)):
        problem = resolve(device="cpu", topk=topk, window=window).check_problem()
        assert problem.topk + problem.window + problem.sinks < problem.length <= 8192 + 128
        assert problem.topk <= topk
        assert problem.window <= window


def test_work_counts_the_keys_that_rows_read():
    problem = resolve(device="cpu", **SMALL).problem(160)
    pairs = sum(min(row + 1, 4 + 20 + 16) for row in range(160))
    assert problem.flops(sparse=True) == 4 * 8 * pairs * 4
    assert problem.flops(sparse=False) == 4 * 8 * (160 * 160 / 2) * 4


def test_scores_are_those_asked_for():
    length = 65536
    problem = resolve(device="cpu", head_dim=1, heads=1, kv_heads=1).problem(length)
    scores = problem.tensors().scores
    assert scores.shape == (1, 1, length)
    assert scores.dtype == torch.float32
    assert float(scores.std()) == pytest.approx(0.7, rel=0.02)
    drift = replace(problem, drift=True).tensors().scores - scores
    torch.testing.assert_close(drift[0, 0], 0.7e-4 * torch.arange(length), rtol=0, atol=1e-5)


def test_the_selection_is_timed_apart_and_what_is_wrong_is_not_ranked():
    again = replace(SPARSEK, name="again")
    report = measured(again, Contender("wrong", "wrong", "selected", selecting_otherwise, devices=("cpu",)))
    for length in (96, 160):
        rows = {row.name: row for row in report.rows if row.length == length}
        ours, dense = rows["ours"], rows["sdpa"]
        assert [row.reason for row in rows.values()] == [""] * 4
        assert [row.check for row in rows.values()] == ["passed", "passed", "passed", "failed"]
        assert ours.selection_ms > 0
        assert ours.selection_share == pytest.approx(ours.selection_ms / ours.both_ms)
        assert (dense.selection_ms, dense.attention_tflops) == (None, None)
        assert dense.both_ratio == pytest.approx(dense.both_ms / ours.both_ms)
        assert rows["wrong"].both_ratio is None


def test_rates_without_the_selection():
    ours = row("ours", forward_ms=2, both_ms=8, selection_ms=1)
    ours.complete(None)
    assert (ours.selection_share, ours.attention_tflops) == (1 / 8, 1)
    # On a machine that does something else meanwhile, a part can take longer than the whole.
    ours = row("ours", forward_ms=2, both_ms=8, selection_ms=9)
    ours.complete(None)
    assert ours.attention_tflops is None


@pytest.mark.parametrize("check", [True, False])
def test_what_takes_long_is_measured_in_one_call_and_last(check, monkeypatch):
    # At this rate the dense pass over 2,000 tokens takes longer than the limit, and nothing else does.
    monkeypatch.setattr(attention, "matmul_tflops", lambda *arguments: 1e-9 * 3.5 * 4 * 8 * 4 * 1000**2)
    monkeypatch.setattr(attention, "PATIENCE_MS", 1.5)
    calls: list[int] = []

    def counted(problem: SparseKProblem, tensors: Tensors) -> Prepared:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            calls.append(query.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return Prepared(attend)

    lines: list[str] = []
    bench = resolve(device="cpu", budget=1.0, **{**SMALL, "lengths": "500,2000"}, check=check)
    bench = replace(bench, contenders=(Contender("counted", "counted", "all", counted), *bench.contenders))
    report = Report("sparsek", bench.facts())
    list(fill(report, bench, lines.append))
    rows = {(row.name, row.length): row for row in report.rows}
    long = rows["counted", 2000]
    assert long.both_ms > long.forward_ms > 0
    assert calls.count(2000) == 1
    assert calls.count(500) > 1
    assert long.note == rows["sdpa", 2000].note == "one call measured"
    assert rows["ours", 2000].note == rows["counted", 500].note == ""
    timed = [line.split()[1] for line in lines if line.lstrip().startswith("2,000")]
    assert timed[0] == "ours"


def test_crossovers_are_where_ours_stays_faster():
    times = {
        "ours": (5, 5, 5, 5),
        "fa2": (9, 4, 6, 9),  # the first is a freak
        "cudnn": (1, 2, 3, 4),
        "fa4": (6, 7, 8, None),
        "broken": (None, None, None, None),
    }
    rows = [row(name, 1024 << i, forward_ms=1, both_ms=ms) for name, each in times.items() for i, ms in enumerate(each)]
    for length in (1024, 2048, 4096, 8192):
        rank(each for each in rows if each.length == length)
    assert crossovers(rows) == {"FA2": 4096, "CUDNN": None, "FA4": 1024}


@pytest.mark.usefixtures("on_cpu")
def test_without_a_gpu_it_says_what_it_measures_and_writes_everything(capsys, tmp_path):
    arguments = ["bench", "sparsek", *ARGUMENTS, "--lengths", "96", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "these are CPU timings" in shown.out
    assert "Not measured here: cudnn, fa2, fa4, GPU memory." in shown.out
    assert "select ms" in shown.out
    assert "dscores" in shown.out
    assert "from" not in shown.out.splitlines()[-1]
    names = ["sparsek.csv", "sparsek.json", "sparsek.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    record = json.loads((tmp_path / "out/sparsek.json").read_text())
    assert (record["options"]["topk"], record["options"]["window"], record["options"]["gate"]) == (20, 16, "value")
    assert len(record["checks"][0]["errors"]) == 5
    with (tmp_path / "out/sparsek.csv").open() as stream:
        ours = next(csv.DictReader(stream))
    assert float(ours["selection_ms"]) == record["rows"][0]["selection_ms"]


@pytest.mark.usefixtures("on_cpu")
def test_the_crossover_is_printed(capsys, monkeypatch):
    assert main(["bench", "sparsek", "--crossover", *ARGUMENTS, "--lengths", "64,96", "--no-check"]) == 0
    assert "SparseK's forward and backward pass against SDPA of torch, dense: " in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "soft"], "--gate soft is not known; choose one of value, log, straight"),
        (["--scores", "ramp"], "--scores ramp is not known; choose one of normal, drift"),
        (["--opponents", "fa2"], "--opponents fa2 cannot be measured on cpu; choose from ours, sdpa"),
        (["--opponents", "flex"], "--opponents 'flex' is not known; choose from ours, sdpa"),
        (["--lengths", "8k"], "--lengths 8k must be whole numbers"),
    ],
)
def test_options_that_cannot_be_measured_name_the_fix(arguments, message, capsys):
    assert main(["bench", "sparsek", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_defaults_suit_the_machine_and_the_question():
    gpu = resolve(device="cuda")
    assert gpu.lengths == (8192, 32768, 131072, 524288)
    found = gpu.options
    assert (found.topk, found.window, found.sinks, found.gate, found.dtype) == (1024, 1024, 4, "value", "bfloat16")
    assert [each.name for each in gpu.contenders] == ["ours", "cudnn", "fa2", "fa4"]
    crossover = resolve(device="cuda", crossover=True)
    assert (crossover.options.topk, crossover.options.window) == (512, 512)
    assert crossover.lengths == (1024, 2048, 4096, 8192, 16384)
    assert [each.name for each in crossover.contenders] == ["ours", "fa2"]
    assert [each.name for each in resolve(device="cpu").contenders] == ["ours", "sdpa"]
    assert {each.name for each in gpu.known} <= set(STYLES)
    with pytest.raises(BenchError, match="sdpa cannot be measured on cuda"):
        resolve(device="cuda", opponents="sdpa")


def test_the_table_fits_its_width():
    bench = resolve(device="cuda")
    rows = [bench.row(each, 524288) for each in bench.contenders]
    for each in rows:
        each.forward_ms, each.both_ms, each.extra_mib, each.check = 6752.1, 24032.1, 18234.5, "passed"
    rows[0].selection_ms = 1234.5
    for each in rows:
        each.complete(790)
    rank(rows)
    console = Console(record=True, width=80, force_terminal=False)
    print_report(Report("sparsek", bench.facts(), {"ceiling_tflops": 790}, rows=rows), console)
    text = console.export_text()
    assert "passed" in text
    assert "…" not in text
