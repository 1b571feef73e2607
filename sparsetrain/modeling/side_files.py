"""Validate the small JSON files beside weights, whose values libraries use unchecked."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers.utils import GENERATION_CONFIG_NAME

from sparsetrain.errors import ModelError, first_line
from sparsetrain.nearest import did_you_mean

OLD_ADAPTER_FIELDS = frozenset({"merge_weights"})
"""A field of old peft versions: whether adapters are merged during evaluation, which changes no result."""

SPECIAL_TOKENS_FILE = "special_tokens_map.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]


class _Generation(BaseModel):
    """The fields of ``generation_config.json`` that control sampling and the end of generation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    do_sample: bool | None = None
    use_cache: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    num_beams: Count | None = None
    num_return_sequences: Count | None = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | Annotated[list[Token], Field(min_length=1)] | None = None
    pad_token_id: Annotated[int, Field(ge=-1)] | None = None


_SpecialTokens = TypeAdapter(dict[str, str | dict[str, Any] | list[str | dict[str, Any]]])


def check_side_files(folder: str) -> None:
    """Refuse a local folder with an invalid generation config or invalid special tokens; Hub ids are not checked.

    Transformers would ignore an invalid generation config and lose the end tokens.

    Raises:
        ModelError: A value is invalid; names the file, the field and the value.
    """
    for name, schema in (
        (GENERATION_CONFIG_NAME, TypeAdapter(_Generation)),
        (SPECIAL_TOKENS_FILE, _SpecialTokens),
    ):
        file = Path(folder) / name
        if file.exists() or file.is_symlink():
            values = read_object(file)
            try:
                schema.validate_json(json.dumps(values), strict=True)
            except ValidationError as error:
                raise ModelError(f"{file}: {_explain(error.errors()[0])}") from error


def check_adapter_values(file: Path) -> None:
    """Refuse values of the wrong type in an adapter's config, and fields that peft does not know and would ignore.

    A null field counts as absent.

    Raises:
        ModelError: A value is refused; names the file, the field and the value.
    """
    from peft import LoraConfig
    from peft import __version__ as peft_version

    values = read_object(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type={kind!r:.60}; sparsetrain loads only LORA")
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in values:
            raise ModelError(f"{file} has no {name}, and peft would use a default instead")
    hints = typing.get_type_hints(LoraConfig, include_extras=True)
    strange = sorted(name for name in values.keys() - hints.keys() - OLD_ADAPTER_FIELDS if values[name] is not None)
    if strange:
        raise ModelError(
            f"{file}: {strange[0]}={values[strange[0]]!r:.100} is unknown to peft {peft_version}"
            f"{did_you_mean(strange[0], hints)}; the adapters were written by peft {values.get('peft_version')!s:.40}: "
            "upgrade peft, or remove the field if it is not one of its settings"
        )
    # An alpha need not be an integer: it is the recipe's scale times the rank.
    hints["lora_alpha"] = Annotated[float, Field(gt=0, lt=2**31)]
    for name, value in values.items():
        if name not in hints:
            continue
        try:
            TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ModelError(f"{file}: {name}={value!r:.100}: {error.errors()[0]['msg']}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ModelError: The file does not exist, cannot be read, or does not hold a JSON object.
    """
    if not file.is_file():
        raise ModelError(f"{file} is not a file; a file with a JSON object is expected")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds {values!r:.60}; a JSON object is expected")
    return values


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "list", "int")))
    return f"{name}={problem['input']!r:.100}: {problem['msg']}"
