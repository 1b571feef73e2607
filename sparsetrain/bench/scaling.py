"""The training step of one recipe on several numbers of ranks that share each row, beside one another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.text import Text

from sparsetrain.bench.case import Case, Log, Pair
from sparsetrain.bench.measure import Unavailable
from sparsetrain.bench.stepping import StepRow
from sparsetrain.bench.table import Report, Row, column, formatted

ONE_ROW = ("train.global_batch_tokens=null", "train.global_batch_sequences=1", "train.micro_batch=1")


@dataclass(frozen=True)
class Shared:
    """So many ranks that share a row, and a way of ``bench step``."""

    ranks: int
    way: str

    @property
    def name(self) -> str:
        """``2 ranks, dense``."""
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}" + (f", {self.way}" if self.way != "recipe" else "")


@dataclass(kw_only=True)
class ScalingRow(StepRow):
    """One length on so many ranks."""

    ranks: int = 0
    efficiency: float | None = column("of linear", optional=True, form=formatted("{:.0%}"))
    """Tokens a second and rank, over those of the fewest ranks that were measured at this length."""
    loss_differs: float | None = column("loss differs", optional=True, form=formatted("{:.1e}"))
    """Of the first step, from that of the fewest ranks, relatively."""
    norm_differs: float | None = column("norm differs", optional=True, form=formatted("{:.1e}"))
    """Of the first step's gradient."""

    @property
    def remark(self) -> str:
        """Nothing: the reason is in the row."""
        return ""

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """Length, ranks and attention, and the reason."""
        left, right = super().ends()
        del left["way"]
        return {"tokens": left.pop("tokens"), "ranks": Text(str(self.ranks), justify="right"), **left}, right

    @staticmethod
    def tables(report: Report) -> Iterable[tuple[str, Sequence[Row]]]:
        """One, of all lengths."""
        yield f"{report.facts['subject']}, random weights, one row a step, shared by all ranks", report.rows


@dataclass(frozen=True)
class ScalingCase(Case):
    """Numbers of ranks at several lengths. All lengths on so many ranks are one process of ``bench step`` a rank, that
    is started when the first of its rows is asked for."""

    lengths_of_rows: Sequence[int]
    method: str
    _found: dict[int, dict[tuple[str, int], dict[str, Any]]] = field(default_factory=dict)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of a row."""
        return self.lengths_of_rows

    @property
    def on_a_cpu(self) -> str:
        """The note for CPUs, where the same code runs."""
        return "No GPU: these are CPU timings, and neither memory nor waiting is counted."

    def begin(self, report: Report, log: Log) -> None:
        """Record what is measured."""
        report.facts |= {"subject": self.subject}

    def order(self, pairs: Sequence[Pair], length: int, report: Report) -> Sequence[Pair]:
        """In the requested order."""
        return pairs

    def row(self, contender: Shared, length: int) -> ScalingRow:
        """An empty row."""
        attention = "full" if contender.way == "dense" else self.method
        return ScalingRow(
            length=length, name=contender.name, way=contender.way, attention=attention, ranks=contender.ranks
        )

    def inputs(self, length: int, report: Report, log: Log) -> int:
        """The length."""
        return length

    def measure(self, contender: Shared, length: int, row: Any, report: Report) -> None:
        """Take over the row of ``bench step``."""
        if contender.ranks not in self._found:
            self._found[contender.ranks] = self._run(contender.ranks)
        found = self._found[contender.ranks].get((contender.way, length))
        if found is None:
            raise Unavailable(f"the {contender.name} ended before; their message is above")
        for each in fields(StepRow):
            if each.name not in ("name", "way", "attention", "length"):
                setattr(row, each.name, found[each.name])

    def finish(self, rows: list[ScalingRow], report: Report) -> None:
        """Compare with the fewest ranks that were measured."""
        for way in dict.fromkeys(row.way for row in rows):
            measured = sorted((row for row in rows if row.way == way and row.seconds), key=lambda row: row.ranks)
            for row in measured[1:]:
                _compare(row, measured[0])

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory()

    def _run(self, ranks: int) -> dict[tuple[str, int], dict[str, Any]]:
        """Measure all lengths on so many ranks; rows that were finished, by way and length."""
        options = self.options
        folder = (options.output or Path(self._folder.name)) / f"ranks-{ranks}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        settings = [*ONE_ROW, *options.overrides, f"sequence.parallel={ranks}"]
        given = {
            "--lengths": ",".join(map(str, self.lengths)),
            "--ways": "recipe,dense" if options.full_up_to else "recipe",
            "--full-up-to": str(options.full_up_to),
            "--repeats": str(options.repeats),
            "--output": str(folder),
        }
        words = [word for option in given.items() for word in option]
        command = [*launcher, "-m", "sparsetrain.cli", "bench", "step", options.recipe, *settings, *words]
        record = folder / "step.json"
        record.unlink(missing_ok=True)  # of an earlier call
        subprocess.run(command, check=False, stdout=sys.stderr)
        rows = json.loads(record.read_text(encoding="utf-8"))["rows"] if record.exists() else []
        return {(row["way"], row["length"]): row for row in rows if row["seconds"] or row["reason"]}


def _compare(row: ScalingRow, fewest: ScalingRow) -> None:
    if row.tokens_per_second and fewest.tokens_per_second:
        row.efficiency = row.tokens_per_second / row.ranks / (fewest.tokens_per_second / fewest.ranks)
    if row.loss and fewest.loss:
        row.loss_differs = abs(row.loss / fewest.loss - 1)
    if row.grad_norm and fewest.grad_norm:
        row.norm_differs = abs(row.grad_norm / fewest.grad_norm - 1)
