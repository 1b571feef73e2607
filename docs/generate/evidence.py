"""The tables of docs/evidence.md and docs/decode-quality.md as JSON, each with its command and what it was measured on.

python docs/generate/evidence.py        # writes docs/evidence.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PAGES = ("evidence.md", "decode-quality.md")
FILE = DOCS / "evidence.json"

HEADING = re.compile(r"^(#+) (.*)$")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
SENTENCE = re.compile(r"(?<=[.:]) (?=[A-Z])")


def experiments(page: str) -> Iterator[dict[str, Any]]:
    """The tables of a page, in its order. A section without commands of its own is measured by those above it, and a
    table without a date at the last one that was told."""
    path: list[tuple[int, str]] = []
    commands: dict[int, list[str]] = {}
    measured: dict[int, str] = {}
    for kind, block in _blocks((DOCS / page).read_text(encoding="utf-8")):
        level = path[-1][0] if path else 0
        if kind == "heading":
            level, title = block
            path = [*(each for each in path if each[0] < level), (level, title)]
            for known in (commands, measured):
                for deeper in [each for each in known if each >= level]:
                    del known[deeper]
        elif kind == "code":
            commands.setdefault(level, []).extend(line for line in block if " " in line)
        elif kind == "text":
            told = [sentence for sentence in SENTENCE.split(block) if DATE.search(sentence)]
            measured[level] = " ".join(told) or measured.get(level, "")
        elif commands and DATE.search(" ".join(measured.values())):
            yield {
                "page": page,
                "section": " / ".join(title for _, title in path[1:]),
                "commands": commands[max(commands)],
                "measured": next(measured[each] for each in sorted(measured, reverse=True) if measured[each]),
                "rows": [dict(zip(block[0], cells, strict=True)) for cells in block[2:]],
            }


def _blocks(text: str) -> Iterator[tuple[str, Any]]:
    """Headings, code, tables as cells, and paragraphs or points as one line each."""
    fenced = False
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if heading := HEADING.match(line):
            yield "heading", (len(heading[1]), heading[2])
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
