"""``sparsetrain bench power`` from the options to the printed and written report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from sparsetrain.bench.attention_opponents import OPPONENTS
from sparsetrain.bench.attention_table import fill
from sparsetrain.bench.options import check_output
from sparsetrain.bench.power import resolve
from sparsetrain.bench.report import Report, print_report, write_report


def run_power(*, output: Path | None = None, **options: Any) -> Report:
    """Measure, print, and write to ``output`` where given, after every length.

    Raises:
        BenchError: an option cannot be measured or written to.
    """
    bench = resolve(**options)
    check_output(output)
    if bench.device.type == "cpu":
        names = ", ".join(each.name for each in OPPONENTS if "cpu" not in each.devices)
        print(
            f"No GPU that torch {torch.__version__} can use: these are CPU timings ({torch.get_num_threads()} threads) "
            f"of the plain PyTorch path, not of the kernels. Not measured here: {names}, GPU memory."
        )
    name = "power-packed" if bench.packed else "power"
    report = Report(name, shlex.join(["sparsetrain", *sys.argv[1:]]), bench.facts())
    for _ in fill(report, bench, lambda line: print(line, file=sys.stderr, flush=True)):
        if output is not None:
            files = write_report(report, output)
    print_report(report)
    if output is not None:
        from sparsetrain.bench.picture import draw

        print("wrote", *files, draw(report, output / f"{name}.png"))
    return report
