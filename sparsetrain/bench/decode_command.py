"""``sparsetrain bench decode`` from the options to the printed and written report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from sparsetrain.bench.decode import resolve
from sparsetrain.bench.decode_opponents import OPPONENTS
from sparsetrain.bench.decode_report import DecodeReport, draw, print_report, write_report
from sparsetrain.bench.decode_table import copy_gbps, measure
from sparsetrain.bench.options import check_output
from sparsetrain.bench.timing import explain


@torch.no_grad()
def run_decode(*, output: Path | None = None, **options: Any) -> DecodeReport:
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
            f"of the plain PyTorch path, not of the kernels. Not measured here: {names}, CUDA graphs."
        )

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = DecodeReport(shlex.join(["sparsetrain", *sys.argv[1:]]), bench.facts())
    try:
        report.copy_gbps = copy_gbps(bench.device, bench.budget_ms)
        log(f"copy within the memory: {report.copy_gbps:,.0f} GB/s")
    except Exception as error:
        log(f"copy within the memory: {explain(error)}")
    for rows in measure(bench, report.copy_gbps, log):
        report.rows += rows
        if output is not None:
            files = write_report(report, output)
    print_report(report)
    if output is not None:
        print("wrote", *files, draw(report, output / "decode.png"))
    return report
