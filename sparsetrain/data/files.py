"""Local files: resolve paths to files, and read their rows one at a time."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec

from sparsetrain.data.values import json_fault, keyed_once
from sparsetrain.errors import DataError

Kind = Literal["lines", "documents", "parquet", "arrow"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "documents",
    ".md": "documents",
    ".rst": "documents",
    ".py": "documents",
}
FOREIGN = frozenset(
    (
        *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".doc", ".docx", ".odt", ".pdf", ".epub", ".htm", ".html", ".xml"),
        *(".tex", ".rtf", ".log", ".yaml", ".yml", ".toml", ".zip", ".tar", ".tgz", ".7z", ".db", ".sqlite", ".avro"),
        *(".feather", ".orc", ".npy", ".npz", ".h5", ".hdf5", ".msgpack", ".pkl", ".pickle", ".pt", ".bin"),
    )
)
"""Suffixes of files that are not read here, and that no Hub dataset's id ends in."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

DAMAGED = "\0damaged\0"
"""Prefix of the text of a row that marks the unreadable rest of a file; the reason follows. Not only zeros, which a
power failure may leave in files."""

STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
STDLIB_HELD_OUT = 20
"""Every 20th file of the standard library is the validation split."""


def is_local(path: str) -> bool:
    """Whether a path means local files rather than a Hub dataset: it exists, or could not be a Hub id."""
    return (
        os.path.exists(os.path.expanduser(path))
        or glob.has_magic(path)
        or path.startswith(("/", ".", "~"))
        or _suffix(path) in KINDS.keys() | FOREIGN
        or path.endswith(COMPRESSIONS)
        or path.count("/") > 1
    )


def find_files(label: str, path: str) -> tuple[Kind, list[str]]:
    """The kind and the sorted files of a file name, glob or folder.

    Raises:
        DataError: There are none, they are not regular files, or of an unknown kind or of several.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = _files_within(expanded)
        nothing = f"the folder {path} holds no {', '.join(KINDS)} file"
    elif glob.has_magic(expanded) and not os.path.exists(expanded):
        files = sorted(file for file in glob.glob(expanded, recursive=True) if os.path.isfile(file))
        nothing = f"no file matches {path}"
    else:
        files = [expanded] if os.path.isfile(expanded) else []
        there = os.path.exists(expanded)
        # A pipe or a device can be read once at most, and may never end.
        nothing = f"{path} is not a regular file" if there else f"{path} does not exist (looked in {os.getcwd()})"
    if not files:
        raise DataError(f"data source {label!r}: {nothing}")
    kinds: dict[Kind, str] = {}
    for file in files:
        if _suffix(file) not in KINDS:
            raise DataError(f"data source {label!r}: {file} is of an unknown kind; known are {', '.join(KINDS)}")
        kinds.setdefault(KINDS[_suffix(file)], file)
    if len(kinds) > 1:
        raise DataError(
            f"data source {label!r}: {path} mixes kinds of files ({', '.join(kinds.values())}); "
            "name one kind with a glob, such as folder/**/*.jsonl"
        )
    return next(iter(kinds)), files


def _files_within(folder: str) -> list[str]:
    """The files of a known kind in a folder and those within it, sorted; no more once two kinds were met.

    So a folder that was meant otherwise, such as ``/``, is not walked to its end.
    """
    files: list[str] = []
    kinds: set[Kind] = set()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = [os.path.join(place, name) for name in names if not name.startswith(".") and _suffix(name) in KINDS]
        found = list(filter(os.path.isfile, found))
        files += found
        kinds |= {KINDS[_suffix(file)] for file in found}
        if len(kinds) > 1:
            break
    return sorted(files)


def stdlib_files(label: str, split: str) -> list[str]:
    """The running interpreter's own library, without tests, installed packages and files that are not UTF-8.

    Raises:
        DataError: ``split`` is neither ``train`` nor ``validation``.
    """
    if split not in ("train", "validation"):
        raise DataError(f"data source {label!r}: python-stdlib has the splits train and validation, not {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
        # The module of the build was written then, and is full of that machine's paths.
        found += [Path(place, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    files = sorted(filter(_is_utf8, found))
    return [str(file) for i, file in enumerate(files) if (i % STDLIB_HELD_OUT == 0) == (split == "validation")]


class Stamped(NamedTuple):
    """The state of a file, so that a changed file is never read from the cache.

    Copying and archiving tools set the modification time (mtime), but nothing sets the change time (ctime).
    """

    path: str
    size: int
    modified: int
    changed: int


def stamped(files: list[str]) -> list[Stamped]:
    """Files with their current state."""
    paths = map(os.path.abspath, files)
    return [Stamped(path, (now := os.stat(path)).st_size, now.st_mtime_ns, now.st_ctime_ns) for path in paths]


def read_documents(files: list[Stamped]) -> Iterator[dict[str, str]]:
    """One row per file: ``{place, text}``.

    Raises:
        DataError: a file is not UTF-8.
    """
    for file, *_ in files:
        try:
            with fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer") as stream:
                text = stream.read()
        except UnicodeDecodeError as problem:
            raise DataError(f"{file} is not UTF-8 text ({problem.reason} at byte {problem.start})") from problem
        except Exception as problem:
            text = _damage(problem)
        yield {"place": file, "text": text}


def read_lines(files: list[Stamped]) -> Iterator[dict[str, str]]:
    """One row for each JSON value, unparsed: ``{place, text}``, place being ``file:line`` or ``file[index]``."""
    for file, *_ in files:
        number = 0
        try:
            # A byte that is not UTF-8 becomes half of a pair: its line is malformed, the others are read.
            with fsspec.open(
                file, "rt", encoding="utf-8-sig", errors="surrogateescape", compression="infer", newline="\n"
            ) as stream:
                first = stream.readline()
                if _suffix(file) == ".json" and first.lstrip().startswith("["):
                    yield from _read_array(file, first + stream.read())
                    continue
                if first.strip() == "{":
                    lines = [first, *stream]
                    _refuse_one_object(file, "".join(lines))
                    first, stream = lines[0], iter(lines[1:])
                for number, line in enumerate(_chain(first, stream), start=1):
                    if line.strip():
                        yield {"place": f"{file}:{number}", "text": _checked(line.rstrip("\r\n"))}
        except Exception as problem:
            yield {"place": f"{file}:{number + 1}", "text": _damage(problem)}


def parse_line(line: str) -> dict[str, Any]:
    """The object on one line.

    Raises:
        ValueError: the line is not JSON, or not an object.
    """
    if line.startswith(DAMAGED):
        raise ValueError(line.removeprefix(DAMAGED))
    try:
        row = json.loads(line, object_pairs_hook=keyed_once)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not valid JSON: {problem.msg} at column {problem.colno}") from problem
    except ValueError as problem:
        raise ValueError(json_fault(problem)) from problem
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {'null' if row is None else type(row).__name__}, not an object")
    return row


def _checked(line: str) -> str:
    """The line, or the text of the row that marks it where it has bytes that are not UTF-8."""
    fault = _not_utf8(line)
    return f"{DAMAGED}{fault}" if fault else line


def _not_utf8(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        byte = ord(text[problem.start]) & 0xFF
        return f"not UTF-8 text (byte 0x{byte:02x} at character {problem.start}); save the file as UTF-8"
    return None


def _read_array(file: str, content: str) -> Iterator[dict[str, str]]:
    if fault := _not_utf8(content):
        raise DataError(f"{file} is {fault}")
    try:
        items = json.loads(content, object_pairs_hook=keyed_once)
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{file}:{problem.lineno} is not valid JSON: {problem.msg} at column {problem.colno}"
        ) from problem
    except (ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else json_fault(problem)
        raise DataError(f"{file} is not valid JSON: {reason}") from problem
    for index, item in enumerate(items):
        yield {"place": f"{file}[{index}]", "text": json.dumps(item)}


def _refuse_one_object(file: str, content: str) -> None:
    """Refuse a file that is one object over several lines, whatever its ending; anything else is read line by line."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    inside = f"; its {lists[0]!r} is a list: write that alone, if it holds the rows" if lists else ""
    raise DataError(f"{file} is one JSON object, not rows; write a list of rows, or one row a line{inside}")


def _damage(problem: Exception) -> str:
    """The text of the row that marks the part of a file that cannot be decompressed.

    Raises:
        Exception: The problem itself, if it is not about the content: the file is missing or not readable.
    """
    if isinstance(problem, DataError) or (isinstance(problem, OSError) and problem.errno is not None):
        raise problem
    # Each compression has errors of its own; one of the program would be told as the file's, with its name.
    return f"{DAMAGED}the file is damaged from here on: {type(problem).__name__}: {problem}"


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _suffix(path: str) -> str:
    """The suffix that tells the format, under that of a compression."""
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1].lower() if suffix.lower() in COMPRESSIONS else suffix.lower()


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
