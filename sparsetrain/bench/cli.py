"""The command line of a benchmark, made from its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Optional

import typer
from pydantic.fields import FieldInfo

from sparsetrain.bench.options import HIDDEN, Options, Positional, Suits, metadata


def command(case: ModuleType) -> Callable[..., None]:
    """A function for typer that measures and reports a file of ``bench/cases``: its parameters are the fields of
    ``Options``, its help is their docstring."""
    kind: type[Options] = case.Options

    def call(**given: Any) -> None:
        from sparsetrain.bench.case import run

        run(case.case(kind(**given)))

    shown = {name: field for name, field in kind.model_fields.items() if HIDDEN not in field.metadata}
    parameters = [_parameter(name, field) for name, field in shown.items()]
    parameters.sort(key=lambda each: each.name == "output")  # behind the options of the case
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__doc__ = kind.__doc__
    return call


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    suits, place = metadata(field, Suits), metadata(field, Positional)
    text, kind = (field.description or "").removesuffix("."), field.annotation
    default: Any = inspect.Parameter.empty if field.is_required() else field.get_default()
    if suits:
        text += f"; by default {suits.cuda}" + f", and {suits.cpu} without a GPU" * (suits.cuda != suits.cpu)
        default = None
    given: Any
    if place is not None:
        # click has no defaults for arguments that are lists; the options drop a None.
        default = default if field.is_required() else None
        given = typer.Argument(metavar=place.metavar, help=f"{text}.", show_default=False)
    else:
        least, most = (
            next((getattr(each, end) for each in field.metadata if hasattr(each, end)), None) for end in ("ge", "le")
        )
        given = typer.Option(help=f"{text}.", min=least, max=most, show_default=default is not None)
        kind = str if kind == tuple[int, ...] else kind
    shown: Any = Optional[kind] if default is None else kind  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[shown, given])
