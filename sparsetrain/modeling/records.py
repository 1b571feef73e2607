"""Records in saved folders: the attention method (``config.json``, ``sparsetrain.json``) and the base of adapters.

A record in the current format has all of its fields; a missing field is an error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sparsetrain.errors import ModelError
from sparsetrain.generation.settings import Decode, parse_decode
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.installed import INSTALLED
from sparsetrain.methods.registry import parse_attention
from sparsetrain.modeling.config_faults import SHAPE
from sparsetrain.modeling.side_files import read_object
from sparsetrain.nearest import did_you_mean
from sparsetrain.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from sparsetrain.recipe.schema import ModelSection

RECORD_FILE = "sparsetrain.json"
RECORD_FORMAT = 2
"""The format number; increased when fields change, or when an older sparsetrain would misread a record."""

IN_CONFIG = frozenset({"format", "version", "attention"})
"""Fields of the record in a model's ``config.json``."""
IN_FILE = IN_CONFIG | {"base", "versions"}
"""Fields of a model's ``sparsetrain.json``."""
OF_ADAPTERS = IN_FILE | {"base_config", "model"}
"""Fields of the ``sparsetrain.json`` in an adapter folder."""
PACKAGE = "package"
"""Additional field for a method of another package: the package's name and version."""
DECODE = "decode"
"""Additional field where generation reads a choice of keys (:func:`~sparsetrain.modeling.set_decode`)."""

IDENTITY = ("model_type", "tie_word_embeddings", *SHAPE)
"""Fields of the base's config that adapters record, because tensors of the same shapes fit other models too."""


def recorded_attention(record: Any, path: str | Path, fields: Collection[str] = IN_CONFIG) -> MethodConfig:
    """The attention method in a record from a model's config or ``sparsetrain.json``.

    Args:
        record: The record as read, of any type.
        path: Where it was read, for the message.
        fields: The fields of a record of this kind.

    Raises:
        ModelError: There is no record, it is malformed, or a newer sparsetrain wrote it.
    """
    if record is None:
        raise ModelError(
            f"{path} records no attention method; load it with transformers and call sparsetrain.sparsify(model, ...)"
        )
    written = record.get("format", 1) if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ModelError(f"the record of the attention method in {path} is damaged: it is {record!r:.100}")
    if written > RECORD_FORMAT:
        raise ModelError(
            f"{path} was written by sparsetrain {record.get('version')} (format {record['format']}); this version "
            f"({__version__}) reads format {RECORD_FORMAT}: upgrade sparsetrain"
        )
    try:
        config = parse_attention(record.get("attention", {}), strict=True)
    except ModelError as error:
        package = record.get(PACKAGE)
        known = "" if package is None else f" (the folder was written with the package {package!s:.100})"
        raise ModelError(
            f"{path} records a method that this version ({__version__}) does not know: {error}{known}"
        ) from None
    installed = INSTALLED.package_of(config.method) is not None
    if written == RECORD_FORMAT:
        fields = {*fields, *({PACKAGE} if installed else ()), *({DECODE} & record.keys())}
        check_fields(record, fields, f"the record of the attention method in {path} is damaged")
    # The fields of another package's method change with that package.
    if written == RECORD_FORMAT and not installed:
        section = {**dict.fromkeys(config.added_fields), **record["attention"]}
        check_fields(section, type(config).model_fields, f"{path} is damaged: attention")
    return config


def recorded_decode(record: Mapping[str, Any], path: str | Path) -> Decode | None:
    """The decode section of a record that :func:`recorded_attention` has read; None where there is none.

    Raises:
        ModelError: it is damaged.
    """
    section = record.get(DECODE)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ModelError(f"{path} is damaged: decode={section!r:.100} is no mapping")
    try:
        return parse_decode(section)
    except ModelError as error:
        raise ModelError(f"{path} is damaged: {error}") from None


def check_fields(values: Mapping[str, Any], fields: Collection[str], what: str) -> None:
    """Refuse a mapping with missing or unknown fields.

    Raises:
        ModelError: There is such a field; names the first.
    """
    if lost := sorted(set(fields) - values.keys()):
        raise ModelError(f"{what}: the field {lost[0]} is missing; copy the file from the run that wrote the folder")
    if strange := sorted(values.keys() - set(fields)):
        raise ModelError(f"{what}: unknown field {strange[0]!r:.60}{did_you_mean(strange[0], fields)}")


def check_same_method(path: str, attention: MethodConfig, decode: Decode | None) -> None:
    """Refuse a local folder whose ``sparsetrain.json`` is damaged or differs from its ``config.json``.

    Raises:
        ModelError: It does; shows both records.
    """
    file = Path(path) / RECORD_FILE
    if not (file.exists() or file.is_symlink()):
        return
    record = read_object(file)
    sections: tuple[tuple[str, Any, Any], ...] = (
        ("attention", recorded_attention(record, file, IN_FILE), attention),
        (DECODE, recorded_decode(record, file), decode),
    )
    for name, found, given in sections:
        if found != given:
            here, beside = (None if each is None else each.model_dump(mode="json") for each in (found, given))
            raise ModelError(
                f"{file} records {name}={here}, and config.json beside it {beside}; copy both files from the run that "
                "wrote the folder"
            )


def adapters_record(path: Path) -> tuple[ModelSection, MethodConfig, dict[str, Any]]:
    """Read the record of an adapter folder: its base, the attention method, and recorded fields of the base's config.

    Raises:
        ModelError: There is no such record, or it is damaged.
    """
    from sparsetrain.recipe.schema import ModelSection

    file = path / RECORD_FILE
    try:
        record = read_object(file)
    except ModelError as error:
        raise ModelError(f"{path} is not an adapter folder of sparsetrain: {error}") from error
    attention = recorded_attention(record, file, OF_ADAPTERS)
    values = record.get("model")
    try:
        section = ModelSection.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in ("model", *fault["loc"]))
        raise ModelError(
            f"{file} does not say which model the adapters belong to: {field}={fault['input']!r:.100}: {fault['msg']}; "
            "copy the file from the run that wrote the folder"
        ) from error
    # Older folders do not have it.
    known = record.get("base_config", {})
    if not isinstance(known, dict):
        raise ModelError(f"{file}: base_config={known!r:.100} is not a mapping")
    if record.get("format") == RECORD_FORMAT:
        # Folders of before lack the last two.
        model = {"chat_template": None, "add_tokens": [], **record["model"]}
        check_fields(model, ModelSection.model_fields, f"{file} is damaged: model")
        check_fields(known, IDENTITY, f"{file} is damaged: base_config")
    return section, attention, known


def identity(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a base's config that adapters record."""
    decoder = config.get_text_config(decoder=True)
    return {name: getattr(decoder, name, None) for name in IDENTITY}


def check_same_base(trained_on: Mapping[str, Any], found: Mapping[str, Any], base: str) -> None:
    """Refuse a base other than the one that the adapters were trained on.

    Raises:
        ModelError: The base differs; names the differences.
    """
    if faults := differences(trained_on, found):
        raise ModelError(f"{base} is not the model that the adapters were trained on: {', '.join(faults)}")


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """How a model's :func:`identity` differs from a recorded one, a field each."""
    # Only fields that both have: an older transformers may lack some.
    both = [name for name in IDENTITY if recorded.get(name) is not None and found[name] is not None]
    other = [name for name in both if recorded[name] != found[name]]
    return [f"{name} is {found[name]!r} instead of {recorded[name]!r}" for name in other]
