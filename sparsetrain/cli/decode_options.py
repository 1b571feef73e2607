"""Options of the command line for a decode section, such as ``--decode.prune.p 0.9``, made from its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Optional

import typer
from pydantic.fields import FieldInfo

from sparsetrain.generation.setting_text import NONE, decode_section
from sparsetrain.recipe.decode_file import read_decode
from sparsetrain.section import Section


def with_decode_options(
    function: Callable[..., None], *, without: Collection[str] = ("calibrated", "heavy_channels")
) -> Callable[..., None]:
    """A command that takes the section in options of its own.

    Args:
        function: takes ``decode`` beside parameters that typer reads: the fields that were given, none of them with
            ``--decode none``, or None where no option was.
        without: fields that have no option, such as ``prune.p``.
    """
    own_parameters = inspect.signature(function, eval_str=True).parameters
    fields = {name: field for name, field in _fields() if name not in without}
    names = {name: f"decode_{name.replace('.', '_')}" for name in fields}
    own = [each for each in own_parameters.values() if each.name != "decode"]
    extra = [_parameter(names[name], f"--decode.{name}", field) for name, field in fields.items()]
    published = _option(
        "decode",
        "--decode",
        "A file of sparsetrain calibrate, or published settings: twilight, twilight-full, quest, double-sparsity, "
        f"refreshkv, recycled; {NONE} reads all keys, also of a model that records a section",
    )

    def call(**arguments: Any) -> None:
        chosen = arguments.pop("decode")
        values = {name: arguments.pop(parameter) for name, parameter in names.items()}
        function(
            **arguments,
            decode=decode_section(
                chosen, {name: text for name, text in values.items() if text is not None}, read_decode
            ),
        )

    parameters = [*own, published, *extra]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    """The fields of the section by their dotted names."""
    from sparsetrain.generation.settings import Decode, Prune, Refresh

    for name, field in Decode.model_fields.items():
        parts: dict[str, type[Section]] = {"prune": Prune, "refresh": Refresh}
        inner = parts.get(name)
        if inner is None:
            yield name, field
        else:
            yield from ((f"{name}.{each}", of_it) for each, of_it in inner.model_fields.items())


def _parameter(name: str, flag: str, field: FieldInfo) -> inspect.Parameter:
    text = " ".join((field.description or "").removesuffix(".").split())
    default = field.get_default()
    return _option(name, flag, text if default is None else f"{text} (default {default})")


def _option(name: str, flag: str, text: str) -> inspect.Parameter:
    option = typer.Option(flag, help=f"{text}.", show_default=False, metavar="VALUE", rich_help_panel="Fewer keys")
    annotation = Annotated[Optional[str], option]  # noqa: UP045 (typer reads it)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
