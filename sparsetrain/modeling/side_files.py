"""The small JSON files beside weights, whose values libraries take as they come: checked for what they may hold."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers.utils import GENERATION_CONFIG_NAME

from sparsetrain.errors import ModelError, first_line
from sparsetrain.modeling.boundary import nearest

OLD_ADAPTER_FIELDS = frozenset({"merge_weights"})
"""What peft wrote once: whether adapters are merged while a model is not trained, which changes no result."""

SPECIAL_TOKENS_FILE = "special_tokens_map.json"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]


class _Generation(BaseModel):
    """What of ``generation_config.json`` decides how tokens are chosen and where they end."""

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
    """Refuse a local folder whose generation config or special tokens are not what libraries take them for; a Hub id
    passes. Transformers would go on without the first, and forget where answers end.

    Raises:
        ModelError: names the file, the field and the value.
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
    """Refuse values in an adapter's config that are not of the kind that peft says they are, and fields that peft does
    not know: it would leave them out. A field that is null says nothing.

    Raises:
        ModelError: names the file, the field and the value.
    """
    from peft import LoraConfig
    from peft import __version__ as peft_version

    values = read_object(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file}: peft_type={kind!r:.60}; sparsetrain loads LORA alone")
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in values:
            raise ModelError(f"{file} has no {name}, which peft would make up")
    hints = typing.get_type_hints(LoraConfig, include_extras=True)
    strange = sorted(name for name in values.keys() - hints.keys() - OLD_ADAPTER_FIELDS if values[name] is not None)
    if strange:
        raise ModelError(
            f"{file}: {strange[0]}={values[strange[0]]!r:.100} means nothing to peft {peft_version}"
            f"{nearest(strange[0], hints)}; the adapters were written by peft {values.get('peft_version')!s:.40}: "
            "upgrade peft, or take the field out if it is no setting of theirs"
        )
    # Whole or not: what a recipe's scale makes of a rank need not be whole.
    hints["lora_alpha"] = Annotated[float, Field(gt=0, lt=2**31)]
    for name, value in values.items():
        if name not in hints:
            continue
        try:
            TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ModelError(f"{file}: {name}={value!r:.100}: {error.errors()[0]['msg']}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: there is none, or something else.
    """
    if not file.is_file():
        raise ModelError(f"{file} is no file, and a JSON object is wanted there")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds {values!r:.60}, and a JSON object is wanted there")
    return values


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "list", "int")))
    return f"{name}={problem['input']!r:.100}: {problem['msg']}"
