"""A benchmark from its options to its report: every contender at every length, in shuffled order. What fails becomes
the reason in its row and stops nothing else."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsetrain.bench.measure import clock_and_power, explain, median_ms, release, shuffled
from sparsetrain.bench.options import Options
from sparsetrain.bench.table import Report, Row, print_report, write_report

Log = Callable[[str], None]
Pair = tuple[Any, Any]
"""A contender and its row."""


@dataclass(frozen=True)
class Case(ABC):
    """A benchmark. :func:`run` is the common part."""

    name: str
    """The name of its output files."""
    options: Any
    contenders: tuple[Any, ...]
    known: tuple[Any, ...]
    """Contenders that other machines can measure."""
    subject: str
    """The subject of the measurement, for the title of a picture."""
    conclude: Callable[[Report], Iterable[str]] = field(default=lambda report: (), kw_only=True)
    """Lines that are printed last."""

    @property
    def device(self) -> torch.device:
        """The device of the measurement."""
        return torch.device(self.options.device)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens."""
        return self.options.lengths

    @property
    def main(self) -> bool:
        """Whether this process reports; others of the same run keep quiet."""
        return True

    not_counted: ClassVar[str] = ""
    """Columns that are not measured on a CPU."""

    @property
    def on_a_cpu(self) -> str:
        """The note to print first if there is no GPU."""
        names = ", ".join(each.name for each in self.known if "cpu" not in each.devices)
        return (
            f"No GPU that torch {torch.__version__} can use: these are CPU timings ({torch.get_num_threads()} threads) "
            f"of the plain PyTorch path, not of the kernels. Not measured here: {names}, {self.not_counted}."
        )

    def facts(self) -> dict[str, Any]:
        """The options as they are recorded with the results."""
        options: Options = self.options
        names = [each.name for each in self.contenders]
        return {"subject": self.subject, **options.model_dump(mode="json", exclude={"output"}), "opponents": names}

    def time(self, call: Callable[[], object], gradients: Sequence[Tensor] = ()) -> float:
        """:func:`median_ms` with the benchmark's options; ``gradients`` are leaves of any shape ``[...]``."""
        return median_ms(call, device=self.device, budget_ms=self.options.budget, gradients=gradients)

    def begin(self, report: Report, log: Log) -> None:  # noqa: B027
        """Measure what all rows are compared with, and check what can be checked once."""

    def order(self, pairs: Sequence[Pair], length: int, report: Report) -> Sequence[Pair]:
        """The order in which contenders are measured."""
        return shuffled(pairs, length)

    @abstractmethod
    def row(self, contender: Any, length: int) -> Row:
        """An empty row."""

    @abstractmethod
    def inputs(self, length: int, report: Report, log: Log) -> Any:
        """The inputs of all contenders at one length."""

    @abstractmethod
    def measure(self, contender: Any, inputs: Any, row: Any, report: Report) -> None:
        """Fill a row. What is measured before a failure is kept."""

    def failed(self, contender: Any, row: Row, error: Exception) -> None:
        """Note why a row is empty."""
        row.reason = explain(error)

    def finish(self, rows: list[Any], report: Report) -> None:  # noqa: B027
        """Work out what follows from the times of one length."""


def run(case: Case) -> Report:
    """Measure, print, and write to ``--output`` where given, after every row."""

    def log(line: str) -> None:
        if case.main:
            print(line, file=sys.stderr, flush=True)

    if case.main and case.device.type == "cpu":
        print(case.on_a_cpu)
    output, report = case.options.output, Report(case.name, case.facts())

    def save() -> list[Path]:
        return write_report(report, output) if case.main and output is not None else []

    for _ in fill(report, case, log, save):
        save()
    if case.main:
        print_report(report)
    if files := save():
        if any(column.panel for column in report.rows[0].columns().values()):
            from sparsetrain.bench.picture import draw

            files.append(draw(report, output / f"{case.name}.png"))
        print("wrote", *files)
    for line in case.conclude(report):
        print(line)
    return report


def fill(report: Report, case: Case, log: Log, save: Callable[[], object] = lambda: None) -> Iterator[Report]:
    """Measure into ``report``, and yield it after every length; ``save`` it after every row."""
    case.begin(report, log)
    for length in case.lengths:
        rows = [case.row(each, length) for each in case.contenders]
        report.rows += rows
        _fill_length(report, case, length, rows, log, save)
        case.finish(rows, report)
        yield report


def _fill_length(
    report: Report, case: Case, length: int, rows: Sequence[Row], log: Log, save: Callable[[], object]
) -> None:
    """The tensors of one length live here alone."""
    try:
        inputs = case.inputs(length, report, log)
    except Exception as error:
        for row in rows:
            row.reason = explain(error)
        return
    for contender, row in case.order(list(zip(case.contenders, rows, strict=True)), length, report):
        compared = len(report.checks)
        try:
            case.measure(contender, inputs, row, report)
            row.mhz, row.watts = clock_and_power(case.device) or (None, None)
        except Exception as error:
            case.failed(contender, row, error)
        release()
        clocks = f"; {row.mhz:,.0f} MHz, {row.watts:,.0f} W" if row.mhz and row.watts else ""
        log(f"{length:>9,}  {contender.name:10}  {row.summary}{clocks}")
        for check in report.checks[compared:]:
            log(f"{length:>9,}  {contender.name:10}  check: {check.summary}")
        save()
