"""Text that every machine of this kind has: the Python sources of the packages installed beside this one.

    python -m sparsetrain.recipes.evidence.packages runs/evidence/packages

``train.jsonl`` has a row for each module, without those of the package held out; ``validation.jsonl`` has the long
modules of that package, so that windows of 8,192 tokens lie within one. ``packages.json`` names the versions: the same
versions give the same files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.entry import run_script

FEWEST, MOST = 1_000, 1_000_000
"""Bytes of a module: shorter ones say little, and longer ones are tables that a program wrote."""
LONG = 40_000
"""Bytes of a module that is long: some 15,000 tokens of the embedded tokenizer."""
LONGEST_LINE = 400
"""Characters; longer lines are data."""


def modules() -> Iterator[tuple[str, Path]]:
    """The package and the path of every module in the folders where packages are installed, sorted."""
    folders = sorted({Path(place).resolve() for place in sys.path if Path(place).name.endswith("-packages")})
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(folder).parts[0].removesuffix(".py"), path


def prose(path: Path) -> str | None:
    """The text of a module, or None where it is none to learn from."""
    data = path.read_bytes()
    if not FEWEST <= len(data) <= MOST:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if max(map(len, text.splitlines())) <= LONGEST_LINE else None


def write(folder: Path, held_out: str) -> dict[str, dict[str, str | int]]:
    """Write the files, and return the packages that gave a megabyte or more."""
    rows: dict[str, list[tuple[bytes, str]]] = {"train": [], "validation": []}
    size: dict[str, int] = {}
    seen = set()
    for package, path in modules():
        text = prose(path)
        digest = hashlib.sha256((text or "").encode()).digest()
        if text is None or digest in seen:
            continue
        seen.add(digest)
        if package != held_out:
            rows["train"].append((digest, text))
            size[package] = size.get(package, 0) + len(text)
        elif len(text) >= LONG and "tests" not in path.parts:
            rows["validation"].append((digest, text))
    if not rows["validation"]:
        raise typer.BadParameter(f"--held-out {held_out}: no module of it is installed and long enough")
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        with (folder / f"{split}.jsonl").open("w") as out:
            # In the order of their digests, which mixes packages and is the same every time.
            out.writelines(json.dumps({"text": text}) + "\n" for _, text in sorted(found))
    named = packages_distributions()
    packages: dict[str, dict[str, str | int]] = {
        package: {"version": version(named[package][0]) if package in named else "", "characters": characters}
        for package, characters in sorted(size.items(), key=lambda item: -item[1])
        if characters >= 1_000_000
    }
    (folder / "packages.json").write_text(json.dumps(packages, indent=1) + "\n")
    return packages


def main(
    folder: Annotated[Path, typer.Argument(help="A folder that is written.")],
    held_out: Annotated[str, typer.Option(help="The package whose long modules are held out.")] = "sympy",
) -> None:
    """Write the sources of installed packages as training and validation text."""
    if (folder / "train.jsonl").exists():
        raise typer.BadParameter(f"{folder} has a train.jsonl already; name another folder, or delete it")
    for package, about in write(folder, held_out).items():
        print(f"{package} {about['version']}: {int(about['characters']) / 1e6:.1f}M characters")
    for split in ("train", "validation"):
        print(f"{split}.jsonl: {(folder / f'{split}.jsonl').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
