"""Schemas of a checkpoint's JSON files. A checksum only shows that a file is unchanged, not that it is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from sparsetrain.durable import read_bytes
from sparsetrain.section import Section

Count = Annotated[int, Field(ge=0, lt=2**62)]
Positive = Annotated[int, Field(gt=0, lt=2**62)]
Word = Annotated[int, Field(ge=0, lt=2**32)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")]
M = TypeVar("M", bound=BaseModel)


class _Strict(Section):
    model_config = ConfigDict(strict=True)


class Entry(_Strict):
    """Size and checksum of a file."""

    bytes: Count
    crc32: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class Manifest(RootModel[dict[FileName, Entry]]):
    """``manifest.json``: the files of a checkpoint by name."""


class EngineCounters(_Strict):
    """Counts of the DeepSpeed engine."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class LossScale(_Strict):
    """The loss scaler of fp16; empty without one."""

    cur_scale: Annotated[float, Field(gt=0)] | None = None
    cur_iter: Annotated[int, Field(ge=-1, lt=2**62)] | None = None
    last_overflow_iter: Annotated[int, Field(ge=-1, lt=2**62)] | None = None
    cur_hysteresis: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class Change(_Strict):
    """A setting that was changed when a run was resumed."""

    step: Count
    """The step of the checkpoint from which the run resumed with the change."""
    key: str
    before: Any
    after: Any


class StateFile(_Strict):
    """``state.json``: :class:`~.state.TrainState` and the counts of the engine."""

    step: Positive
    tokens: Count
    ranks: Annotated[int, Field(gt=0, lt=1_000_000)]
    rows_per_step: Positive
    steps: Positive
    data: dict[str, Any]
    wandb_run_id: Annotated[str, Field(pattern=r"^[^/\\#?%:\s]{1,128}$")] | None
    history: list[Change]
    engine: EngineCounters
    loss_scale: LossScale


class RandomState(_Strict):
    """The random state of a rank, in the form that the generators return."""

    python: tuple[Literal[3], Annotated[list[Word], Field(min_length=625, max_length=625)], float | None]
    numpy: tuple[
        Literal["MT19937"],
        Annotated[list[Word], Field(min_length=624, max_length=624)],
        Annotated[int, Field(ge=0, le=624)],
        Literal[0, 1],
        float,
    ]
    torch: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1 << 16)]
    cuda: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=1 << 16)] | None = None


class RankFile(_Strict):
    """``rank-00000.json``: the random state of one rank, and the record of its tensor file."""

    random: RandomState
    file: Entry
    """Its tensor file."""


def read(file: Path, schema: type[M]) -> M:
    """Read and validate a JSON file of a checkpoint.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a file, or its content is invalid; the message names the place.
    """
    try:
        return schema.model_validate_json(read_bytes(file))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        place = ".".join(map(str, first["loc"]))
        found = f" ({place}={first['input']!r:.60})" if place else ""
        raise ValueError(f"{file.name} is invalid{found}: {first['msg'][:200]}") from None
