"""``sparsetrain runs`` and ``sparsetrain logs``: the runs in a folder, and the log of one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.completion import complete_run


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder with the run folders.")] = Path("runs"),
) -> None:
    """List runs: state, step, last loss, size, and when they last wrote something.

    A run that is stopped goes on with `sparsetrain run RECIPE --resume`.

    \b
    Examples:
      sparsetrain runs
      sparsetrain runs /data/runs
    """
    from rich.console import Console
    from rich.table import Table

    from sparsetrain.tables import print_tables
    from sparsetrain.training.output.run_list import list_runs

    found = list_runs(folder)
    if not found:
        print(f"{folder} holds no runs", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "size", "last written"):
        table.add_column(column, justify="right" if column in ("step", "loss", "size") else "left", no_wrap=True)
    for run in found:
        # Before training begins, how many steps its tokens or epochs are is not known here.
        steps = f"{run.steps:,}" if run.steps is not None else run.planned or "?"
        loss = "-" if run.loss is None else f"{run.loss:.4f}"
        state = f"{run.state} (early stopping)" if run.ended_early else run.state
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        table.add_row(str(run.folder), state, f"{run.step:,}/{steps}", loss, _size(run.size), written)
    print_tables(Console(highlight=False, markup=False), table)


def logs(
    run_folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False, autocompletion=complete_run),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines, until the run ends or Ctrl-C.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="The last so many; by default all.", show_default=False)
    ] = None,
) -> None:
    """Print what a run said, with dates and times: its log, `run.log` in the run folder.

    \b
    Examples:
      sparsetrain logs runs/quickstart
      sparsetrain logs runs/quickstart --follow --lines 20
    """
    from sparsetrain.training.output.run_list import log_lines

    for line in log_lines(run_folder, last=lines, follow=follow):
        print(line, end="", flush=follow)


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
