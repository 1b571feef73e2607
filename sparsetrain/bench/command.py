"""``sparsetrain bench power`` and ``bench sparsek`` from the options to the printed and written report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsetrain.bench import power, sparsek
from sparsetrain.bench.attention_bench import AttentionBench
from sparsetrain.bench.attention_opponents import Opponent, P
from sparsetrain.bench.attention_table import fill
from sparsetrain.bench.options import check_output
from sparsetrain.bench.report import Report, print_report, write_report


def run_power(*, output: Path | None = None, **options: Any) -> Report:
    """Measure, print, and write to ``output`` where given, after every length.

    Raises:
        BenchError: an option cannot be measured or written to.
    """
    bench = power.resolve(**options)
    return _run("power-packed" if bench.packed else "power", bench, power.OPPONENTS, output)


def run_sparsek(*, output: Path | None = None, **options: Any) -> Report:
    """The same for SparseK; with ``crossover``, say last from which length on it is faster.

    Raises:
        BenchError: an option cannot be measured or written to.
    """
    bench = sparsek.resolve(**options)
    report = _run("sparsek-crossover" if bench.crossover else "sparsek", bench, sparsek.OPPONENTS, output)
    if bench.crossover:
        for title, length in sparsek.crossovers(report.rows).items():
            faster = "slower at the longest length measured" if length is None else f"faster from {length:,} tokens on"
            print(f"SparseK's forward and backward pass against {title}: {faster}")
    return report


def _run(name: str, bench: AttentionBench[P], known: Sequence[Opponent[P]], output: Path | None) -> Report:
    check_output(output)
    if bench.device.type == "cpu":
        names = ", ".join(each.name for each in known if "cpu" not in each.devices)
        print(
            f"No GPU that torch {torch.__version__} can use: these are CPU timings ({torch.get_num_threads()} threads) "
            f"of the plain PyTorch path, not of the kernels. Not measured here: {names}, GPU memory."
        )
    report = Report(name, shlex.join(["sparsetrain", *sys.argv[1:]]), bench.facts())
    for _ in fill(report, bench, lambda line: print(line, file=sys.stderr, flush=True)):
        if output is not None:
            files = write_report(report, output)
    print_report(report)
    if output is not None:
        from sparsetrain.bench.picture import draw

        print("wrote", *files, draw(report, output / f"{name}.png"))
    return report
