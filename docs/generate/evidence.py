"""The tables of docs/evidence.md and docs/decode-quality.md as JSON, each with its command and what it was measured on.

python docs/generate/evidence.py        # writes docs/evidence.json

A row says with which seeds, on which machine and when it was measured. Seeds are those that its columns or its name
tell, else those of the table's commands, else that of the recipe. Machine and date are those that the text before the
table tells. Where that tells several, or seeds that the commands do not have, a comment before the table says which is
whose::

    <!-- measured:
    - {rows: [stride], machine: one thread of a shared CPU, date: 2026-12-01}
    - {seeds: [2], machine: one H200, date: 2026-12-01}
    -->

An entry is for the rows whose names begin with one of its ``rows``, and for its ``seeds``; for all, where it has none.
Of several, the first counts. Where all of a row have seeds, it has no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parents[1]
PAGES = ("evidence.md", "decode-quality.md")
FILE = DOCS / "evidence.json"

HEADING = re.compile(r"^(#+) (.*)$")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
SENTENCE = re.compile(r"(?<=[.:]) (?=[A-Z])")
MACHINE = re.compile(
    r"\b(?:one|two) (?:H200|H100)s?|\b(?:one thread of )?a shared CPU|\bone core of a CPU"
    r"|\bCPU cores of the H200's machine|\b(?:two|a 2)[- ](?:CPU cores|core CPU)|\bCPU\b",
    re.IGNORECASE,
)
RECIPE = re.compile(r"\brecipes/evidence/[\w-]+\.yaml")
SEED_OF_COMMAND = re.compile(r"--seed (\d+)")
SEED_COLUMN = re.compile(r"^seed (\d+)$")
SEEDS_TOLD = re.compile(r"\bseeds? \d+(?:(?:, | and | / )\d+)*")
COMMENT = "<!-- measured:"


@dataclass
class Told:
    """What the text of one section tells."""

    commands: list[str] = field(default_factory=list)
    measured: str = ""
    """Its last sentences with a date."""
    machines: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)


def experiments(page: str, text: str | None = None) -> Iterator[dict[str, Any]]:
    """The tables of a page, in its order. A section without commands of its own is measured by those above it, and a
    table without a date or a machine at the last one that was told.

    Args:
        text: of the page; by default that of its file.
    """
    path: list[tuple[int, str]] = []
    known: dict[int, Told] = {}
    comment: list[dict[str, Any]] = []
    for kind, block in _blocks((DOCS / page).read_text(encoding="utf-8") if text is None else text):
        level = path[-1][0] if path else 0
        if kind == "heading":
            level, title = block
            path = [*(each for each in path if each[0] < level), (level, title)]
            known = {each: told for each, told in known.items() if each < level}
            continue
        told = known.setdefault(level, Told())
        if kind == "code":
            told.commands.extend(line for line in block if " " in line)
        elif kind == "comment":
            comment = block
        elif kind == "text":
            dated = " ".join(sentence for sentence in SENTENCE.split(block) if DATE.search(sentence))
            told.measured = dated or told.measured
            told.machines = list(dict.fromkeys([*told.machines, *map(_plain, MACHINE.findall(block))]))
            told.dates = list(dict.fromkeys([*told.dates, *DATE.findall(block)]))
        else:
            inner = [known[each] for each in sorted(known, reverse=True)]
            commands = next((each.commands for each in inner if each.commands), [])
            measured = next((each.measured for each in inner if each.measured), "")
            if commands and measured:
                where = f"{page}, {' / '.join(title for _, title in path[1:])}"
                tells = {
                    "machine": [each.machines for each in inner if each.machines],
                    "date": [each.dates for each in inner if each.dates],
                }
                rows = [dict(zip(block[0], cells, strict=True)) for cells in block[2:]]
                yield {
                    "page": page,
                    "section": " / ".join(title for _, title in path[1:]),
                    "commands": commands,
                    "measured": measured,
                    "rows": [{"cells": row, "runs": _runs(row, commands, tells, comment, where)} for row in rows],
                }
            comment = []


def _runs(
    row: dict[str, str],
    commands: list[str],
    tells: dict[str, list[list[str]]],
    comment: list[dict[str, Any]],
    where: str,
) -> list[dict[str, Any]]:
    """Seeds, machine and date of a row: an entry for all seeds that have the same.

    Args:
        tells: machines and dates in the text, of the section itself first, then of those around it.

    Raises:
        ValueError: the text tells none, or several and no comment says which, or the comment names another.
    """
    name = next(iter(row.values()))
    entries = [each for each in comment if "rows" not in each or name.startswith(tuple(each["rows"]))]
    runs: list[dict[str, Any]] = []
    for seed in _seeds(row, commands, entries):
        entry = next((each for each in entries if seed in each.get("seeds", [seed])), {})
        run = {"seeds": [seed]}
        for what, found in tells.items():
            nearest = found[0] if found else []
            if what not in entry and len(nearest) != 1:
                raise ValueError(f"{where}, row {name!r}, seed {seed}: which {what}? The text tells {nearest}")
            run[what] = str(entry.get(what, *nearest[:1]))
            if not any(run[what] in each for each in found):
                raise ValueError(f"{where}, row {name!r}, seed {seed}: the text does not tell of {what} {run[what]}")
        if runs and all(runs[-1][what] == run[what] for what in tells):
            runs[-1]["seeds"].append(seed)
        else:
            runs.append(run)
    return runs


def _seeds(row: dict[str, str], commands: list[str], entries: list[dict[str, Any]]) -> list[int]:
    cells = iter(row.items())
    _, name = next(cells)
    if columns := [int(at[1]) for column, cell in cells if cell and (at := SEED_COLUMN.match(column))]:
        return columns
    for text in (name, *row):
        if told := SEEDS_TOLD.search(text):
            return [int(each) for each in re.findall(r"\d+", told[0])]
    if entries and all("seeds" in each for each in entries):
        return sorted({seed for each in entries for seed in each["seeds"]})
    if asked := dict.fromkeys(int(seed) for line in commands for seed in SEED_OF_COMMAND.findall(line)):
        return list(asked)
    recipes = [recipe for line in commands for recipe in RECIPE.findall(line)]
    return [_seed_of(recipes[-1]) if recipes else 0]


def _seed_of(recipe: str) -> int:
    """The seed of a recipe, which its runs have where the command gives none."""
    from sparsetrain.recipe import load_recipe

    return load_recipe(DOCS.parent / recipe).recipe.train.seed


def _plain(machine: str) -> str:
    """A machine as it stands inside a sentence."""
    return machine if machine.startswith("CPU") else machine[0].lower() + machine[1:]


def _blocks(text: str) -> Iterator[tuple[str, Any]]:
    """Headings, code, comments, tables as cells, and paragraphs or points as one line each."""
    fenced = False
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if heading := HEADING.match(line):
            yield "heading", (len(heading[1]), heading[2])
        elif line == COMMENT:
            said = []
            while lines[at] != "-->":
                said.append(lines[at])
                at += 1
            at += 1
            yield "comment", yaml.safe_load("\n".join(said))
        elif line.startswith("```") or line.startswith("    "):
            fenced = line.startswith("```")
            code = [] if fenced else [line.strip()]
            while at < len(lines) and (not lines[at].startswith("```") if fenced else lines[at].startswith("    ")):
                code.append(lines[at].strip())
                at += 1
            at += fenced
            yield "code", code
        elif line.startswith("|"):
            rows = [line]
            while at < len(lines) and lines[at].startswith("|"):
                rows.append(lines[at])
                at += 1
            yield "table", [[cell.replace("**", "").strip() for cell in row.strip("|").split("|")] for row in rows]
        elif line.strip():
            told = [line]
            while at < len(lines) and lines[at].strip() and not lines[at].startswith(("|", "#", "```", "- ")):
                told.append(lines[at].strip())
                at += 1
            yield "text", " ".join(told)


def content() -> str:
    """The file."""
    found = [each for page in PAGES for each in experiments(page)]
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(content(), encoding="utf-8")
