"""What was measured of each batch, kept on the disk, so that an evaluation that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from sparsetrain.world import World

T = TypeVar("T")

Key = tuple[str, str, str]
"""The name of a task, a digest of its settings, and a digest of a batch."""


class Journal:
    """The records of finished batches by task, settings and content.

    Every rank appends what it measures to a file of its own: JSON lines, of which the first says what is evaluated. Any
    number of ranks can go on from these files. A journal that was not opened writes nothing. After a fault of the disk
    nothing more is kept, and the evaluation goes on.

    Args:
        file: of this rank.
        about: what is evaluated.
        say: is told of faults of the disk.
    """

    def __init__(
        self,
        file: Path | None = None,
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._file, self._about, self._say = file, about, say
        self._out: TextIO | None = None
        self._others = ""
        self._records: dict[Key, Any] = {}
        self._new: dict[Key, Any] = {}
        self.notes: list[str] = []
        """What was found in the files, for the user; the same on every rank."""

    @classmethod
    def open(
        cls,
        folder: Path,
        label: str,
        about: Mapping[str, Any],
        world: World,
        *,
        fresh: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Journal:
        """The journal of an evaluation, with the records that are there; a collective operation.

        Files of an evaluation of something else are removed, and :attr:`notes` says in what it differs.

        Args:
            folder: is made where it is missing, in one that exists.
            label: of the evaluation, from which the names of its files are made.
            about: JSON of what the records depend on beside tasks and inputs, such as the model, its attention and its
                dtype. That of rank 0 holds for all ranks.
            fresh: remove what is there.
            say: is told of faults of the disk, on the rank that has them.
        """
        about = _gathered(json.loads(json.dumps(about)), world)[0]
        name = re.sub(r"[^a-z0-9.-]+", "-", label.lower()).strip("-")
        if len(name) > 100 or re.search(r"[^\w.,:()= -]", label):
            # Labels whose names begin or read alike have files of their own.
            name = f"{name[:80]}-{digest(label)[:8]}"
        journal = cls(folder / f"{name}.rank{world.rank}.jsonl", about, say)
        journal._others = f"{name}.rank*.jsonl"
        notes, useless = set(), []
        try:
            folder.mkdir(exist_ok=True)
            for file in sorted(folder.glob(journal._others)):
                records, fault = ({}, None) if fresh else _read(file, about)
                journal._new |= records
                if fresh or fault is not None:
                    useless.append(file)
                if fault is not None:
                    notes.add(f"{file} is not used: {fault}")
        except OSError as error:
            journal._give_up(error)
        # Other ranks may read the same files, so these are removed when all have.
        journal.share(world)
        journal.notes = sorted(set().union(*_gathered(notes, world)))
        journal._remove(useless, world)
        if journal._records:
            journal.notes.append(f"{len(journal._records):,} finished batches are taken from {folder}")
        return journal

    def remove(self, world: World) -> None:
        """Remove the files of all ranks, once nothing more is added."""
        if self._file is not None:
            self._remove(sorted(self._file.parent.glob(self._others)), world)
            with suppress(OSError):
                self._file.parent.rmdir()  # if it is empty
        self._file = self._out = None

    def part(self, task: str, settings: str) -> Part:
        """The records of a task with these settings."""
        return Part(self, task, digest(settings))

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __getitem__(self, key: Key) -> Any:
        return self._records[key]

    def add(self, key: Key, record: Any) -> None:
        """Keep a record, in the file at once. It is then what is read back from JSON."""
        line = json.dumps({**dict(zip(("task", "settings", "batch"), key, strict=True)), "record": record})
        self._records[key] = self._new[key] = json.loads(line)["record"]
        if self._file is None:
            return
        try:
            self._out = self._out or self._appended(self._file)
            self._out.write(line + "\n")
            self._out.flush()
        except OSError as error:
            self._give_up(error)

    def share(self, world: World) -> None:
        """Give every rank the records of all; a collective operation."""
        for new in _gathered(self._new, world):
            self._records |= new
        self._new = {}

    def _give_up(self, error: OSError) -> None:
        self._say(f"{self._file} cannot be written: {error.strerror}; finished samples are not kept from here on")
        self._file = self._out = None

    def _remove(self, files: list[Path], world: World) -> None:
        """Remove those of this rank, or on rank 0 all."""
        for file in files:
            if world.main or file == self._file:
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    def _appended(self, file: Path) -> TextIO:
        """The file, open behind its last line."""
        out = file.open("a", encoding="utf-8")
        # A kill can leave a part of a line, which an empty one ends.
        out.write("\n" if out.tell() else json.dumps({"evaluation": self._about}) + "\n")
        return out


@dataclass(frozen=True)
class Part:
    """The records of a task by the digest of the batch."""

    journal: Journal
    task: str
    settings: str

    def __contains__(self, batch: str) -> bool:
        return (self.task, self.settings, batch) in self.journal

    def __getitem__(self, batch: str) -> Any:
        return self.journal[self.task, self.settings, batch]

    def add(self, batch: str, record: Any) -> None:
        """Keep a record; see :meth:`Journal.add`."""
        self.journal.add((self.task, self.settings, batch), record)


def digest(value: Any) -> str:
    """16 hexadecimal digits of the content of dataclasses, arrays, tensors, plain values, and lists and dicts of them.

    Raises:
        TypeError: there is something else in it.
    """
    found = hashlib.sha256()
    _put(found, value)
    return found.hexdigest()[:16]


def _put(found: Any, value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        _put(found, {each.name: getattr(value, each.name) for each in fields(value)})
    elif isinstance(value, np.ndarray | torch.Tensor):
        array = np.ascontiguousarray(value.cpu().numpy() if isinstance(value, torch.Tensor) else value)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    elif isinstance(value, Mapping):
        _put(found, [[key, each] for key, each in value.items()])
    elif isinstance(value, list | tuple):
        found.update(f"[{len(value)}".encode())
        for each in value:
            _put(found, each)
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        found.update(f"{type(value).__name__}{value!r},".encode())
    else:
        raise TypeError(f"no digest of a {type(value).__name__}; make batches of dataclasses, arrays, lists and texts")


def _read(file: Path, about: Any) -> tuple[dict[Key, Any], str | None]:
    """The records of a file, or why it has none of this evaluation."""
    records: dict[Key, Any] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    header = _parsed(lines[0]).get("evaluation") if lines else None
    if not isinstance(header, dict):
        return {}, "it does not say what was evaluated"
    other = sorted(name for name in {**header, **about} if header.get(name) != about.get(name))
    if other:
        return {}, f"it is of other {' and '.join(other)}"
    for line in map(_parsed, lines[1:]):
        key = tuple(line.get(name) for name in ("task", "settings", "batch"))
        if "record" in line and all(isinstance(part, str) for part in key):
            records[key] = line["record"]  # type: ignore[index]
    return records, None


def _parsed(line: str) -> dict[str, Any]:
    """The object of a line; empty where a kill left a part of one."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _gathered(value: T, world: World) -> list[T]:
    """The values of all ranks."""
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(found, value)
    return found
