"""``sparsetrain report`` and ``sparsetrain compare``: runs as HTML pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.arguments import check_place
from sparsetrain.cli.completion import complete_run
from sparsetrain.durable import folder_fault
from sparsetrain.errors import DataError


def report(
    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of a run, finished or not.", show_default=False, autocompletion=complete_run
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file; by default report.html in the run folder.", show_default=False)
    ] = None,
) -> None:
    """Write the page of a run: one HTML file with its numbers, curves, evaluations and recipe.

    A run writes it at its end. The file needs no network and no other file. What is missing or damaged in the folder is
    named in the page. An earlier page is replaced.

    \b
    Examples:
      sparsetrain report runs/quickstart
      sparsetrain report runs/quickstart --output quickstart.html
    """
    if output is not None:
        check_place(output)
    elif run_folder.is_dir() and (fault := folder_fault(run_folder)) is not None:
        raise DataError(f"{run_folder}: {fault}; name a file of another folder with --output")
    from sparsetrain.evaluation.html.page import write_page
    from sparsetrain.training.changes import read_history

    print(write_page(run_folder, out=output, history=read_history(run_folder)))


def compare(
    run_folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN...", help="Folders of runs, 2 to 12.", show_default=False, autocompletion=complete_run
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file.")] = Path("compare.html"),
) -> None:
    """Compare runs in one HTML page: curves over one another, tables with differences, settings that differ.

    Differences are to the first run. Of each run the last evaluation is compared. An earlier page is replaced.

    \b
    Examples:
      sparsetrain compare runs/quickstart runs/quickstart-sliding
      sparsetrain compare runs/power runs/sliding runs/full --output three.html
    """
    check_place(output)
    from sparsetrain.evaluation.html.compare import write_comparison

    print(write_comparison(run_folders, output))
