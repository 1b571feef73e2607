from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from sparsetrain.bench import decoding, measure
from sparsetrain.bench.case import fill
from sparsetrain.bench.cases import decode
from sparsetrain.bench.contenders import listed
from sparsetrain.bench.contenders.base import PACKED_STEP, Contender, Prepared
from sparsetrain.bench.decoding import DecodeCase, DecodeProblem, DecodeRow, Layer, compare
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.picture import STYLES, draw
from sparsetrain.bench.table import Report, print_report, write_report
from sparsetrain.cli import main
from sparsetrain.errors import BenchError
from sparsetrain.generation import listed as generation

SMALL: dict[str, Any] = {
    "lengths": "96,160",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "block": 16,
    "topk": 24,
    "candidates": 32,
    "budget": 1.0,
}
CHOOSING = ("twilight", "twilight-quest", "quest", "channels", "twilight-channels", "twilight-own", "refresh")
ARGUMENTS = ("--lengths", "96", "--heads", "2", "--head-dim", "8", "--block", "16", "--topk", "24", "--budget", "1")


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fails(problem: DecodeProblem, layer: Layer) -> Prepared:
    raise Unavailable("not installed: pip install it")


def resolve(**options: Any) -> DecodeCase:
    return decode.case(decode.Options(**options))


def measured(*more: Contender, **options: Any) -> Report:
    bench = resolve(device="cpu", **{**SMALL, **options})
    bench = replace(bench, contenders=(*bench.contenders, *more))
    report = Report("decode", bench.facts(), command="sparsetrain bench decode")
    list(fill(report, bench, lambda line: None))
    return report


@pytest.fixture
def report(monkeypatch) -> Report:
    monkeypatch.setattr(decoding, "copy_gbps", lambda *arguments: 2.0)
    wrong = Contender("wrong", "wrong", "all", lambda *_: Prepared(lambda q, k, v: q * k.mean() * v.mean()))
    return measured(Contender("absent", "absent", "all", fails), wrong)


def test_every_implementation_that_runs_agrees_and_is_timed(report):
    for length in (96, 160):
        rows = {row.name: row for row in report.rows if row.length == length}
        assert list(rows) == ["ours", "sparsek", *CHOOSING, "sdpa", "absent", "wrong"]
        for name in ("ours", "sparsek", *CHOOSING, "sdpa"):
            assert (rows[name].check, rows[name].reason) == ("passed", "")
            assert rows[name].ms > 0
            assert rows[name].gbps == pytest.approx(rows[name].bytes_read / rows[name].ms / 1e6)
            assert rows[name].floor_ratio == pytest.approx(rows[name].gbps ** -1 * 2.0)
        assert rows["sdpa"].speedup == 1
        assert rows["absent"].reason == "not installed: pip install it"
        assert (rows["wrong"].check, rows["wrong"].speedup) == ("failed", None)


def test_layers_share_the_time():
    assert resolve(device="cpu", **SMALL).problem(96).layers == 1
    report = measured(layers=3, lengths="96", check=False)
    assert {row.check for row in report.rows} == {""}
    assert all(row.ms > 0 for row in report.rows)


def test_bytes_are_those_of_the_listed_keys():
    problem = resolve(device="cpu", dtype="bfloat16", batch=8, heads=32, kv_heads=8).problem(131072)
    assert problem.bytes_read("all") == 2 * 131072 * 8 * 8 * 128 * 2
    blocks = len(problem.pattern.key_blocks(511))
    assert problem.bytes_read("blocks") == 2 * blocks * 256 * 8 * 8 * 128 * 2
    assert problem.bytes_read("selected") == 2 * (4 + 2 * problem.topk) * 8 * 8 * 128 * 2
    assert problem.topk == 128
    # The own block is read up to the new token.
    assert resolve(device="cpu", batch=1, kv_heads=1).problem(257).bytes_read("blocks") == 2 * 257 * 128 * 4


def test_bytes_of_chosen_keys_are_counted():
    report = measured(lengths="160", opponents=",".join(CHOOSING), layers=2)
    rows = {row.name: row for row in report.rows}
    whole, heads = 2 * 2 * 2 * 160 * 8 * 4, 2 * 2
    codes, bounds, labels = heads * 160 * (8 // 2 + 4), heads * 10 * 2 * 8 * 4, heads * 160 * (4 // 2 + 4)
    listed = resolve(device="cpu", **SMALL).problem(160).listed_keys
    beside = {
        "twilight": codes,
        "twilight-quest": codes * 32 // 160 + bounds,
        "quest": bounds,
        "channels": labels,
        "twilight-channels": codes * (4 + 32 + 64) // 160 + labels,
        "twilight-own": codes * listed // 160,
        "refresh": codes / 8,
    }
    for name, row in rows.items():
        assert row.bytes_read == pytest.approx(row.kept * whole + beside[name])
    # The first 4, the last 64 and two pages of 16.
    assert 68 / 160 <= rows["quest"].kept <= 100 / 160
    assert rows["channels"].kept == (4 + 32 + 64) / 160
    assert rows["refresh"].kept == rows["twilight"].kept < 1


def test_few_keys_hold_the_weight():
    problem = resolve(device="cpu", batch=1, heads=4, kv_heads=1, p=0.9).problem(16384)
    (layer,) = problem.tensors()
    twilight = next(each for each in resolve(device="cpu").known if each.name == "twilight")
    visible = twilight.prepare(problem, layer).visible()
    assert 0.005 < visible.float().mean() < 0.04
    logits = (layer.query[0, :, 0] @ layer.key[0, 0].T) * 128**-0.5
    assert (logits.softmax(-1) * visible[0]).sum(-1).min() > 0.85


def test_a_step_that_reads_other_keys_than_it_says_fails(monkeypatch):
    wrong = listed._visible
    monkeypatch.setattr(listed, "_visible", lambda *arguments: wrong(*arguments).roll(16, -1))
    assert [row.check for row in measured(lengths="160", opponents="twilight").rows] == ["failed"]


def test_steps_are_alike_and_a_choice_is_used_again(monkeypatch):
    problem = resolve(device="cpu", **SMALL).problem(160)
    (layer,) = problem.tensors()
    counted = []
    original = generation.estimate_scores

    def estimate(*inputs: Any, due: torch.Tensor | None = None, **options: Any) -> Any:
        counted.append(due is None or bool(due.any()))
        return original(*inputs, due=due, **options)

    monkeypatch.setattr(generation, "estimate_scores", estimate)
    for name, estimates in (("twilight", 16), ("refresh", 2)):
        prepared = next(each for each in listed.STEPS if each.name == name).prepare(problem, layer)
        counted.clear()
        outs = [prepared.attend(*layer) for _ in range(16)]
        assert all(torch.equal(outs[0], each) for each in outs)
        assert sum(counted) == estimates


def test_speed_is_over_the_best_full_cache():
    def row(name: str, size: int, **more: Any) -> DecodeRow:
        return DecodeRow(length=1024, name=name, title=name, sparse=name == "ours", bytes_read=size, **more)

    rows = [
        row("ours", 10**6, ms=1),
        row("flash", 10**7, ms=6),
        row("math", 10**7, ms=9),
        row("bad", 10**7, ms=0.1, check="failed"),
        row("none", 10**7),
    ]
    for row in rows:
        row.complete(copy_gbps=2.0)
    compare(rows)
    assert [row.speedup for row in rows] == [6, 1, pytest.approx(2 / 3), None, None]
    assert (rows[0].gbps, rows[0].floor_ms, rows[0].floor_ratio) == (1, 0.5, 2)
    compare(rows[:1])
    assert rows[0].speedup is None


def test_the_packed_layout_is_undone():
    tensor = torch.randn(3, 4, 1, 8)
    assert torch.equal(PACKED_STEP.restore(PACKED_STEP.arrange(tensor)), tensor)


def test_backends_that_share_no_heads_get_groups_as_rows(monkeypatch):
    problem = resolve(device="cpu", **SMALL).problem(96)
    (layer,) = problem.tensors()
    math = next(each for each in resolve(device="cuda").known if each.name == "math")
    want = math.prepare(problem, layer)
    original = torch.nn.functional.scaled_dot_product_attention

    def refusing(*args, enable_gqa=False, **options):
        if enable_gqa:
            raise RuntimeError("No available kernel")
        return original(*args, **options)

    expected = want.attend(*layer)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refusing)
    got = math.prepare(problem, layer)
    assert "as query rows" in got.note
    torch.testing.assert_close(got.attend(*layer), expected)


def test_flash_attention_2_of_its_package_reads_the_whole_cache(monkeypatch):
    problem = resolve(device="cpu", **SMALL).problem(96)
    (layer,) = problem.tensors()
    fa2 = next(each for each in resolve(device="cuda").known if each.name == "fa2")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(Unavailable, match="pip install flash-attn"):
        fa2.prepare(problem, layer)

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal):
        assert cache_seqlens.tolist() == [k_cache.shape[1]] * len(q)
        assert causal
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k_cache, v_cache))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)

    package = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    prepared = fa2.prepare(problem, layer)
    out = prepared.layout.restore(prepared.attend(*map(prepared.layout.arrange, layer)))
    torch.testing.assert_close(out, problem.definition(layer, "all"))


def test_files_hold_everything_and_the_table_says_why_a_row_is_empty(report, tmp_path):
    report.rows[0].error = float("nan")
    table, record = write_report(report, tmp_path / "new/folder")
    with table.open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(int(line["length"]), line["name"]) for line in lines] == [(row.length, row.name) for row in report.rows]
    read = json.loads(record.read_text())
    assert read["options"]["lengths"] == [96, 160]
    assert read["copy_gbps"] == 2.0
    assert read["rows"][0]["error"] == "nan"
    assert draw(report, tmp_path / "decode.png").stat().st_size > 10_000
    console = Console(record=True, width=80, force_terminal=False)
    print_report(report, console)
    text = console.export_text()
    assert "160 tokens" in text
    assert "absent: not installed: pip install it" in text


def test_every_implementation_has_a_picture_style():
    assert {each.name for each in resolve(device="cuda").known} <= set(STYLES)


def test_help_shows_examples(capsys):
    assert main(["bench", "decode", "--help"]) == 0
    assert "sparsetrain bench decode --output bench" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_without_a_gpu_it_says_what_it_measures(capsys, tmp_path):
    assert main(["bench", "decode", *ARGUMENTS, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "these are CPU timings" in shown.out
    assert "Not measured here: fa2, flash, cudnn, efficient, math, varlen, CUDA graphs." in shown.out
    assert "SDPA of torch, full cache" in shown.out
    assert "copy within the memory" in shown.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["decode.csv", "decode.json", "decode.png"]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "8k"], "--lengths 8k must be whole numbers of tokens with commas between"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--dtype", "fp8"], "--dtype fp8 is not known; choose one of bfloat16, float16, float32"),
        (["--opponents", "ours,flx"], "--opponents 'flx' is not known; choose from ours, sparsek, twilight"),
        (["--opponents", "flash"], "--opponents flash cannot be measured on cpu; choose from ours, sparsek, twilight"),
        (["--p", "1.5"], "Invalid value for '--p'"),
    ],
)
def test_options_that_cannot_be_measured_name_the_fix(arguments, message, capsys):
    assert main(["bench", "decode", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(BenchError, match="is a file; name a folder"):
        decode.case(decode.Options(output=tmp_path / "taken", **SMALL))


def test_defaults_suit_the_machine():
    gpu, cpu = resolve(device="cuda"), resolve(device="cpu")
    found = gpu.options
    assert (gpu.lengths, found.batch, found.heads, found.kv_heads) == ((8192, 32768, 131072), 8, 32, 8)
    assert (found.dtype, found.layers) == ("bfloat16", 4)
    case = cpu.problem(96)
    assert (cpu.lengths, case.batch, case.heads, case.layers) == ((1024, 4096), 2, 4, 1)
    assert [each.name for each in gpu.contenders] == [
        "ours",
        "sparsek",
        *CHOOSING,
        "fa2",
        "flash",
        "cudnn",
        "efficient",
        "math",
        "varlen",
    ]
