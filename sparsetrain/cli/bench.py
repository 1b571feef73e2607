"""``sparsetrain bench``: one command per file in ``sparsetrain/bench/cases``, created on demand."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from sparsetrain.cli.flow import flowing


class Cases(TyperGroup):
    """The group of commands, named after their files."""

    def list_commands(self, context: Any) -> list[str]:
        """All names."""
        from sparsetrain.bench import cases

        return [found.name for found in pkgutil.iter_modules(cases.__path__)]

    def get_command(self, context: Any, name: str) -> Any:
        """A command for listings: the file is parsed, not imported, because it may import torch."""
        if name not in self.list_commands(context):
            return None
        file = importlib.util.find_spec(f"sparsetrain.bench.cases.{name}").origin  # type: ignore[union-attr]
        module = ast.parse(Path(str(file)).read_text(encoding="utf-8"))
        classes = {each.name: each for each in module.body if isinstance(each, ast.ClassDef)}
        return _command(name, lambda: None, ast.get_docstring(classes["Options"]))

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        """The command to run, with its options."""
        name, found, rest = super().resolve_command(context, arguments)
        if name is not None and found is not None:
            from sparsetrain.bench.cli import command

            _try_output(rest)
            found = _command(name, command(importlib.import_module(f"sparsetrain.bench.cases.{name}")))
        return name, found, rest


def _try_output(arguments: list[str]) -> None:
    """Refuse an ``--output`` that cannot be written before the benchmark is imported, which takes seconds."""
    from sparsetrain.bench.options import check_folder

    for index, argument in enumerate(arguments):
        flag, given, folder = argument.partition("=")
        if flag == "--output" and (given or arguments[index + 1 :]):
            check_folder(Path(folder if given else arguments[index + 1]))


def _command(name: str, function: Callable[..., None], text: str | None = None) -> Any:
    made = typer.Typer(add_completion=False, rich_markup_mode="rich")
    made.command(name=name, help=flowing(text or function.__doc__))(function)
    return typer.main.get_command(made)


app = typer.Typer(
    help="Measure the kernels against the best other implementations.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    cls=Cases,
)
