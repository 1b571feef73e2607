"""The docstring of a public function that takes or returns a tensor gives a shape, such as ``[B, N]``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sparsetrain

PACKAGE = Path(sparsetrain.__file__).parent
EXCEPTIONS = {
    # Methods of transformers' cache layers, whose documentation gives the shapes.
    "modeling/cache.py": {"update", "lazy_initialization", "batch_select_indices"},
    # The arguments of transformers' AttentionInterface, and cu_seqlens, which the glossary defines.
    "modeling/attention/call.py": {"parse_call", "documents"},
    "modeling/attention/documents.py": {"explicit_documents", "bounds"},
    # The tensors are a list of rows, and every field of a memory, whose own docstrings give the shapes.
    "methods/memory.py": {"select_rows"},
    "methods/sparsek/state.py": {"select_rows", "map"},
}


def functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Public functions, and public methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield from functions(node.body) if isinstance(node, ast.ClassDef) else (node,)


def takes_tensors(function: ast.FunctionDef) -> bool:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [argument.annotation for argument in every if argument is not None] + [function.returns]
    return any(each is not None and re.search(r"\bTensor\b", ast.unparse(each)) for each in annotations)


def test_tensor_functions_give_shapes() -> None:
    checked, without = 0, []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for function in functions(ast.parse(file.read_text(encoding="utf-8")).body):
            if not takes_tensors(function) or function.name in EXCEPTIONS.get(name, ()):
                continue
            checked += 1
            text = ast.get_docstring(function) or ""
            # An override may refer to the method that it overrides.
            if not re.search(r"\[.*\]", text) and not text.startswith("See :meth:"):
                without.append(f"{name}:{function.lineno} {function.name}")
    assert checked > 50
    assert not without
