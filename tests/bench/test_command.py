from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import torch

from sparsetrain.bench import cases
from sparsetrain.bench.attention import AttentionCase
from sparsetrain.bench.cases import power
from sparsetrain.cli import main
from sparsetrain.errors import BenchError

SMALL = ("--lengths", "96", "--heads", "2", "--head-dim", "8", "--block", "16", "--budget", "1")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_help_shows_examples(capsys):
    assert main(["bench", "power", "--help"]) == 0
    assert "sparsetrain bench power --output bench" in capsys.readouterr().out


@pytest.mark.parametrize("case", sorted(file.stem for file in Path(cases.__file__).parent.glob("[a-z]*.py")))
def test_options_have_types_that_every_typer_knows(case):
    """``Annotated[int, ...] | None`` is refused by versions of typer; ``Annotated[int | None, ...]`` is not."""
    options = importlib.import_module(f"sparsetrain.bench.cases.{case}").Options
    inner = [(name, part) for name, field in options.model_fields.items() for part in get_args(field.annotation)]
    assert [(name, part) for name, part in inner if get_origin(part) is Annotated] == []


@pytest.mark.usefixtures("on_cpu")
def test_without_a_gpu_it_says_what_it_measures(capsys, tmp_path):
    assert main(["bench", "power", *SMALL, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "these are CPU timings" in shown.out
    flex = "flex, flex-tma, flex-flash"
    assert f"Not measured here: ours-triton, {flex}, fa4-blocks, cudnn, fa2, fa4, varlen, GPU memory." in shown.out
    assert "SDPA of torch, dense" in shown.out
    assert "forward + backward" in shown.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["power.csv", "power.json", "power.png"]
    assert json.loads((tmp_path / "out/power.json").read_text())["options"]["device"] == "cpu"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "8k"], "--lengths 8k must be whole numbers of tokens with commas between"),
        (["--lengths", "1024,0"], "--lengths 1024,0 must be whole numbers"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--dtype", "fp8"], "--dtype fp8 is not known; choose one of bfloat16, float16, float32"),
        (["--packed", "--batch", "2"], "--batch 2 does not go with --packed"),
        (["--opponents", "ours,flx"], "--opponents 'flx' is not known; choose from ours, sdpa, or all"),
        (
            ["--opponents", "flex"],
            "--opponents flex cannot be measured on cpu without --packed; choose from ours, sdpa",
        ),
    ],
)
def test_options_that_cannot_be_measured_name_the_fix(arguments, message, capsys):
    assert main(["bench", "power", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_anything_runs(tmp_path, capsys):
    Path(tmp_path / "taken").write_text("")
    assert main(["bench", "power", *SMALL, "--output", str(tmp_path / "taken")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def resolve(**options) -> AttentionCase:
    return power.case(power.Options(**options))


def test_defaults_suit_the_machine():
    gpu, cpu = resolve(device="cuda"), resolve(device="cpu")
    case = cpu.problem(96)
    assert (cpu.lengths, case.heads, case.kv_heads, case.dtype) == ((1024, 4096), 4, 2, torch.float32)
    assert (gpu.lengths, gpu.options.heads, gpu.options.kv_heads) == ((8192, 32768, 131072), 32, 8)
    assert gpu.options.dtype == "bfloat16"
    flex, dense = ["flex", "flex-tma", "flex-flash"], ["cudnn", "fa2", "fa4"]
    assert [each.name for each in gpu.contenders] == ["ours", "ours-triton", *flex, "fa4-blocks", *dense]
    packed = resolve(device="cuda", packed=True)
    assert [each.name for each in packed.contenders] == ["ours", "ours-triton", *flex, "varlen"]
    with pytest.raises(BenchError, match="cudnn cannot be measured on cuda with --packed"):
        resolve(device="cuda", packed=True, opponents="ours,cudnn")
    assert resolve(device="cuda", heads=4, kv_heads=1, lengths="1048576").problem(1048576).flops(True) > 0


@pytest.mark.parametrize("window", [1, 5, 6])
def test_the_checked_length_has_a_far_block_and_little_else(window):
    bench = resolve(device="cpu", window=window, packed=True)
    case = bench.check_problem()
    first = case.documents[0] // case.pattern.block
    farthest = {first - key for key in case.pattern.key_blocks(first) if key >= case.pattern.sinks}
    assert max(farthest) >= window
    assert case.length <= 8192
    assert sum(case.documents) == case.length
