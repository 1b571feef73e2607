"""Triton's interpreter without work whose results nobody sees: half of its time.

It computes every sum, difference and product of integers a second time in 64 bits, for an assertion that it then
drops; searches all of ``triton.language`` again for each function that a kernel calls; and makes a table of types for
each look at one. What kernels compute, read and write stays the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Change the interpreter of this process; parts that this release of Triton does not have are left as they are."""
    builder: Any = interpreter.interpreter_builder
    options = builder.options
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patched_once(interpreter._patch_lang, interpreter._LangPatchScope)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)


def patched_once(patch: Callable[[Any], Any], scope_type: type[Any]) -> Callable[[Any], Any]:
    """``patch(function)`` for the modules that a function sees, unless a launch that has not ended did so already."""
    patched: set[int] = set()

    def patch_new(function: Any) -> Any:
        seen = {id(module) for module in function.__globals__.values() if module is tl or module is tl.core}
        if seen and seen <= patched:
            return scope_type()
        scope = patch(function)
        patched.update(seen)
        restore = scope.restore

        def restore_all() -> None:
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    return patch_new


def remembered(find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """The dtype of NumPy for a type of Triton: that of its elements, by their name."""
    known: dict[str, np.dtype] = {}

    def look_up(kind: Any) -> np.dtype:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if element.name not in known:
            known[element.name] = find(element)
        return known[element.name]

    return look_up
