"""Model and adapter folders with one thing wrong in them, made from good ones: every value of every file in turn."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELETED = object()
VALUES = (None, "", -1, 0, "x", [], {}, 10**30, True, DELETED)
DEEPEST = 4
"""How far into a file keys are changed."""
WIDEST = 3
"""How many entries of a list or a large table are."""


@dataclass(frozen=True)
class Damage:
    """One thing wrong."""

    file: str
    what: str
    do: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def damages(folder: Path) -> Iterator[Damage]:
    """Everything that is tried with the files of a folder."""
    for file in sorted(folder.iterdir()):
        name = file.name
        if name.endswith(".json"):
            yield from _values(name, json.loads(file.read_text()))
        yield Damage(name, "deleted", Path.unlink)
        yield Damage(name, "empty", lambda file: file.write_bytes(b""))
        yield Damage(name, "a folder", _folder)
        yield Damage(name, "a pipe", lambda file: (file.unlink(), os.mkfifo(file)))
        yield Damage(name, "a link to nothing", lambda file: (file.unlink(), file.symlink_to("nothing")))
        for share in (0.5, 0.99):
            yield Damage(name, f"cut at {share:.0%}", lambda file, share=share: _cut(file, share))
        if name.endswith(".safetensors"):
            yield Damage(
                name, "header of 10^18 bytes", lambda file: _overwrite(file, 0, (10**18).to_bytes(8, "little"))
            )
            yield Damage(name, "no header", lambda file: _overwrite(file, 8, b"not json"))
        else:
            for text in ("null", "[]", '"x"', "{", "{}", "1", "[" * 100_000, "\ufeff{}"):
                yield Damage(name, f"is {text:.5}", lambda file, text=text: file.write_text(text))
            yield Damage(name, "not UTF-8", lambda file: file.write_bytes(b"\xff\xfe\x00{"))


def damaged(folder: Path, damage: Damage, place: Path) -> Path:
    """A copy of a folder with the damage done."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    damage.do(place / damage.file)
    return place


def _values(file: str, document: Any) -> Iterator[Damage]:
    for path in _paths(document, ()):
        for value in VALUES:
            what = "deleted" if value is DELETED else json.dumps(value)
            yield Damage(
                file,
                f"{'.'.join(map(str, path))} = {what}",
                lambda file, path=path, value=value: file.write_text(json.dumps(_changed(document, path, value))),
            )


def _paths(value: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    if len(above) == DEEPEST:
        return
    if isinstance(value, dict):
        entries = list(value.items())
        for key, inner in entries if len(entries) < 60 else entries[:WIDEST]:
            yield from _paths(inner, (*above, key))
    elif isinstance(value, list):
        for index, inner in list(enumerate(value))[:WIDEST]:
            yield from _paths(inner, (*above, index))


def _changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(document)
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def _overwrite(file: Path, offset: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + len(data)] = data
    file.write_bytes(content)
