"""Compiles families of kernels for Hopper, as many as lines ``FAMILY DTYPE`` come in; a line says when each is done.

    python tests/kernels/cross_compile_families.py --record

compiles what has changed of all of them and writes ``compiled_kernels.json``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import cross_compile
import cross_compile_segments
from compiled_kernel import RECORD, begin

FAMILIES = cross_compile.FAMILIES | cross_compile_segments.FAMILIES
TESTED = (
    *("plain bf16", "plain fp32", "selected bf16", "hopper bf16", "mirror bf16", "sparsek fp32", "sum bf16"),
    *("lists fp16", "listed bf16", "decode bf16", "projection bf16"),
    *(f"segments {name} bf16" for name in ("listed", "rows", "choice", "work", "selected")),
)


def compile_family(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Print the facts of its kernels, and return them."""
    family, dtype = name.rsplit(" ", 1)
    begun = begin(name, record)
    FAMILIES[family](dtype)
    return begun.told


def read_record() -> dict[str, Any]:
    """What is recorded, if no line of it was changed by hand."""
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, facts in record.items():
        assert facts.pop("seal", None) == seal(name, facts), f"{RECORD.name}: {name} is not as it was written"
    return record


def seal(name: str, facts: dict[str, Any]) -> str:
    """Only the first kernel of a family is compiled again, so that a changed number of another would go unnoticed."""
    return hashlib.sha256(f"{name} {json.dumps(facts)}".encode()).hexdigest()[:8]


def write_record() -> None:
    """One line a kernel."""
    record, new = read_record(), {}
    for name in TESTED:
        new |= compile_family(name, record)
    sealed = {name: {**facts, "seal": seal(name, facts)} for name, facts in sorted(new.items())}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in sealed.items())
    RECORD.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        write_record()
    else:
        recorded = read_record()
        for line in sys.stdin:
            compile_family(line.strip(), recorded)
            print(f"compiled {line.strip()}", flush=True)
