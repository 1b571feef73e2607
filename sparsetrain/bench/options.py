"""Options of a benchmark: a Section, filled in for the machine. ``bench/cli.py`` makes the command line of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

from sparsetrain.durable import folder_fault
from sparsetrain.errors import BenchError
from sparsetrain.section import Section

HIDDEN = "no option of the command line"


T = TypeVar("T")


@dataclass(frozen=True)
class Positional:
    """An argument of the command line instead of an option."""

    metavar: str


@dataclass(frozen=True)
class Suits:
    """Defaults that depend on the machine."""

    cuda: Any
    cpu: Any


def one_of(*choices: str) -> AfterValidator:
    """Refuse any other text."""

    def check(value: str, info: ValidationInfo) -> str:
        if value not in choices:
            raise BenchError(f"--{info.field_name} {value} is not known; choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def parse_lengths(text: str | tuple[int, ...]) -> tuple[int, ...]:
    """``--lengths``, without repeats."""
    if not isinstance(text, str):
        return text
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise BenchError(f"--lengths {text} must be whole numbers of tokens with commas between, such as 8192,32768")
    return tuple(dict.fromkeys(map(int, words)))


def check_folder(output: Path | None) -> Path | None:
    """``--output`` is where a folder may be, and files can be written."""
    if output is not None and output.exists() and not output.is_dir():
        raise BenchError(f"--output {output} is a file; name a folder")
    if output is not None and (fault := folder_fault(output)) is not None:
        raise BenchError(f"--output {output}: {fault}; name another folder")
    return output


Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Lengths = Annotated[tuple[int, ...], BeforeValidator(parse_lengths)]
Folder = Annotated[Path | None, AfterValidator(check_folder)]


class Options(Section):
    """Options of every benchmark. The docstring of a field is its help text."""

    device: Annotated[str, HIDDEN]
    output: Folder = None
    """Folder for the CSV, the JSON and the picture."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in given.items() if value is not None}
        if "device" not in given:
            import torch

            given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return cls.suited(given) | given

    @classmethod
    def suited(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The defaults of the machine ``given["device"]``."""
        found = {name: metadata(field, Suits) for name, field in cls.model_fields.items()}
        return {name: getattr(suits, given["device"]) for name, suits in found.items() if suits}


class ShapeOptions(Options):
    """Attention of one shape at several lengths: long sequences in bfloat16 on CUDA, short ones in float32 on a CPU."""

    lengths: Annotated[Lengths, Suits("8192,32768,131072", "1024,4096")]
    """Tokens, commas between."""
    batch: Count = 1
    """Sequences."""
    heads: Annotated[Count, Suits(32, 4)]
    """Query heads."""
    kv_heads: Annotated[Count, Suits(8, 2)]
    """KV heads."""
    head_dim: Count = 128
    """Elements of a head."""
    dtype: Annotated[str, one_of("bfloat16", "float16", "float32"), Suits("bfloat16", "float32")]
    """bfloat16, float16 or float32."""
    opponents: str = "all"
    budget: Annotated[float, Field(ge=1)] = 150
    """Milliseconds to repeat each measurement for."""
    check: bool = True
    """First compare outputs and gradients; what fails is not ranked."""

    @classmethod
    def suited(cls, given: dict[str, Any]) -> dict[str, Any]:
        """No more KV heads than heads."""
        suits = super().suited(given)
        return suits | {"kv_heads": min(suits["kv_heads"], given.get("heads", suits["heads"]))}

    @model_validator(mode="after")
    def _check_heads(self) -> ShapeOptions:
        if self.heads % self.kv_heads:
            raise BenchError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads} (GQA groups)")
        return self

    def shape(self) -> dict[str, Any]:
        """The fields of a problem that are options."""
        import torch

        sizes = self.model_dump(include={"batch", "heads", "kv_heads", "head_dim"})
        return sizes | {"dtype": getattr(torch, self.dtype), "device": torch.device(self.device)}


class PatternOptions(ShapeOptions):
    """A block pattern too."""

    block: Count = 256
    """Tokens in a block of the pattern."""
    window: Count = 5
    """Nearest blocks, the query's own included."""
    sinks: CountOrNone = 1
    """First blocks, which every query reads."""


def metadata(field: FieldInfo, kind: type[T]) -> T | None:
    """The annotation of that type on a field; None if there is none."""
    return next((each for each in field.metadata if isinstance(each, kind)), None)
