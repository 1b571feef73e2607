"""``sparsetrain bench``: a command for each file of ``sparsetrain/bench/cases``, made when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import typer
from typer.core import TyperGroup


class Cases(TyperGroup):
    """The commands by the names of their files."""

    def list_commands(self, context: Any) -> list[str]:
        """All names."""
        from sparsetrain.bench import cases

        return [found.name for found in pkgutil.iter_modules(cases.__path__)]

    def get_command(self, context: Any, name: str) -> Any:
        """The command of that name."""
        if name not in self.list_commands(context):
            return None
        from sparsetrain.bench.options import command

        case = importlib.import_module(f"sparsetrain.bench.cases.{name}")
        made = typer.Typer(add_completion=False, rich_markup_mode="rich")
        made.command(name=name)(command(case.Options, case.run))
        return typer.main.get_command(made)


app = typer.Typer(
    help="Time the kernels beside the best implementations of others.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    cls=Cases,
)
