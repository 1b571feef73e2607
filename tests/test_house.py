"""The house stays in order: imports run downwards and in no circle, and files are short (docs/architecture.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", Path(__file__).parent.parent / "docs/house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_run_downwards(house):
    wrong = [
        f"{module} imports {other}: {house.room(module)} is not above {house.room(other)}"
        for module, others in house.imports().items()
        for other in others
        if not house.may_import(house.room(module), other)
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_modules_import_each_other(house):
    assert house.circles(house.imports()) == []


def test_a_circle_is_found(house):
    assert house.circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [["b", "c"]]


def test_files_are_short(house):
    root = house.ROOT
    files = [file for folder in (*house.PACKAGES.values(), root / "tests") for file in folder.rglob("*.py")]
    lengths = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in files}
    long = {name: length for name, length in lengths.items() if length > house.LONGEST and name not in house.LONG}
    assert not long, f"split them, or list them in docs/house.py with the reason: {long}"
    assert not {name for name in house.LONG if lengths.get(name, 0) <= house.LONGEST}, "no longer long"


def test_the_kernels_stand_alone(house):
    assert not house.may_import("kernels", "ground")
    imported = {
        other for module, others in house.imports().items() if house.room(module) == "kernels" for other in others
    }
    assert all(house.room(other) == "kernels" for other in imported)
