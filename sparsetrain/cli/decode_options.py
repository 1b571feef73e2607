"""Options of the command line for a decode section, such as ``--decode.prune.p 0.9``, made from its fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic.fields import FieldInfo

from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.section import Section

NONE = "none"
"""Of ``--decode``: no section."""


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
            decode=decode_section(chosen, {name: text for name, text in values.items() if text is not None}),
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


def split_setting(flag: str, text: str) -> tuple[str | None, dict[str, str]]:
    """A setting with fields behind it, as in ``twilight,prune.p=0.9``: its name or file, and the fields.

    Raises:
        RecipeError: a part is no field, or a field is there twice.
    """
    # Commas inside of brackets belong to a list.
    first, *rest = re.split(r",(?![^\[]*\])", text)
    name, parts = (None, [first, *rest]) if "=" in first and not Path(first).is_file() else (first, rest)
    fields: dict[str, str] = {}
    for part in parts:
        field, equals, value = part.strip().partition("=")
        if not equals:
            raise RecipeError(f"{flag} {text}: {part} is no field; write a setting, then fields such as prune.p=0.9")
        if field in fields:
            raise RecipeError(f"{flag} {text}: {field} is there twice; give it once")
        fields[field] = value
    return name, fields


def read_value(field: str, text: str) -> Any:
    """The value of a field, which messages call so: ``--decode.prune.p``.

    Raises:
        ModelError: it is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"{field} {text} is no value such as 0.9, 8, quest or [0, 1]") from error


def decode_section(published: str | None, given: dict[str, str]) -> dict[str, Any] | None:
    """The fields that were given, laid over a file or published settings; empty for no section, None for no option."""
    section: dict[str, Any] = {}
    if published == NONE:
        if given:
            flag = f"--decode.{next(iter(given))}"
            raise ModelError(f"--decode {NONE} reads all keys, so {flag} would have no effect; drop one")
        return section
    if published is not None:
        from sparsetrain.modeling.decode_section import read_decode

        section = read_decode(published).model_dump(mode="json")
    for name, text in given.items():
        value = read_value(f"--decode.{name}", text)
        part, _, inner = name.rpartition(".")
        place = section if not part else section.get(part) or {}
        if part:
            section[part] = place
        place[inner] = value
    return section or None
