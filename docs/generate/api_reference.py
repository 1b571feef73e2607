"""The reference of the Python functions and classes, written from signatures and docstrings without importing them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"sparsetrain": ROOT / "sparsetrain", "sparsetrain_kernels": ROOT / "kernels/sparsetrain_kernels"}

PARTS = {
    "sparsetrain": ("Models", "What most programs need.", None),
    "sparsetrain.recipe": (
        "Recipes",
        "How a program reads recipes; [recipes](recipes.md) says what they mean.",
        ("load_recipe", "shipped_recipes"),
    ),
    "sparsetrain.methods.base": (
        "Methods",
        "The bases of an attention method; [adding a method](adding-a-method.md) has examples.",
        ("MethodConfig", "Method", "Expected"),
    ),
    "sparsetrain.patterns": ("Block patterns", "Which blocks a static method reads.", ("Pattern",)),
    "sparsetrain.evaluation.base": (
        "Evaluation tasks",
        "The bases of a task; [evaluation](evaluation.md#add-a-task) has an example.",
        ("TaskSection", "Task", "TaskResult"),
    ),
    "sparsetrain_kernels": (
        "Attention operations",
        "Tensors in, tensors out, without a model. [Kernels](kernels.md) tells how they work.",
        None,
    ),
}
"""The modules, each with its title, a line about it, and the names to show (all of ``__all__`` where None)."""

SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:", "Example:")


def reference() -> str:
    """The page as Markdown."""
    lines = ["# Python reference", "", "Written from the docstrings. Shapes are given as `[B, N]`, batch first.", ""]
    for module, (title, about, names) in PARTS.items():
        lines += [f"## {title}: `{module}`", "", about, ""]
        for name in names or _exported(module):
            node = find(module, name)
            lines += [f"### `{name}` {{#{module}.{name}}}", "", *_described(node, name, module)]
    return "\n".join(lines) + "\n"


def find(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Where a name is defined, along the imports of the packages.

    Raises:
        LookupError: it is neither defined nor imported there.
    """
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and node in tree.body:
            return node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            return find(node.module, name)
    raise LookupError(f"{module} has no {name}")


def _tree(module: str) -> ast.Module:
    package, *parts = module.split(".")
    path = PACKAGES[package].joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _exported(module: str) -> list[str]:
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    raise LookupError(f"{module} has no __all__")


def _described(node: ast.FunctionDef | ast.ClassDef, name: str, module: str) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield from _code(_signature(node, name))
        yield from _docstring(node)
        return
    made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    yield from _code(_signature(made, name, drop=1) if made else f"class {name}")
    yield from _docstring(node)
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_") and ast.get_docstring(each):
            yield f"#### `{each.name}` {{#{module}.{name}.{each.name}}}"
            yield ""
            words = [ast.unparse(decorator) for decorator in each.decorator_list]
            yield from _code(_signature(each, each.name, drop=0 if "staticmethod" in words else 1, words=words))
            yield from _docstring(each)


def _code(text: str) -> Iterator[str]:
    yield from ("```python", text, "```", "")


def _signature(node: ast.FunctionDef, name: str, drop: int = 0, words: list[str] | None = None) -> str:
    """A signature, an argument a line where it is long; without the first ``drop`` arguments."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_argument(each, default) for each, default in zip(positional, defaults)][drop:]
    if arguments.vararg:
        parts.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(each, default) for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        parts.append(f"**{_argument(arguments.kwarg, None)}")
    # A constructor returns its object.
    back = f" -> {_plain(node.returns)}" if node.returns and node.name != "__init__" else ""
    marks = "".join(f"@{word}\n" for word in words or () if word in ("property", "classmethod", "abstractmethod"))
    line = f"{marks}{name}({', '.join(parts)}){back}"
    if len(line) <= 88:
        return line
    return f"{marks}{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){back}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {_plain(argument.annotation)}" if argument.annotation else "")
    return f"{text} = {ast.unparse(default)}" if default is not None else text


def _plain(annotation: ast.expr) -> str:
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    return str(text).replace("torch.", "").replace("nn.Module", "Module")


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=True)
    if not text:
        return
    block: list[str] = []
    title = ""
    for line in [*text.splitlines(), "Raises:"]:
        if line.strip() in SECTIONS and not line.startswith(" "):
            yield from _part(title, block)
            title, block = line.strip(), []
        else:
            block.append(line)


def _part(title: str, block: list[str]) -> Iterator[str]:
    """A section of a docstring: arguments become a list, the rest stays text."""
    text = inspect.cleandoc("\n".join(block))
    if not text:
        return
    if title:
        yield f"**{title.removesuffix(':')}**"
        yield ""
    if title in ("Args:", "Raises:"):
        for line in text.splitlines():
            name, colon, rest = line.partition(": ")
            if not line.startswith(" ") and colon:
                yield f"- `{name}`: {markdown(rest)}"
            else:
                yield f"  {markdown(line.strip())}"
    else:
        yield markdown(text)
    yield ""


def markdown(text: str) -> str:
    """Docstring markup as Markdown: roles and double backticks become code."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")
