"""Triton's interpreter without work whose results nobody sees: a quarter of its time.

It decides anew at each operation what its types ask for (``replayed_builtins.py``); computes every sum, difference and
product of integers a second time in 64 bits, for an assertion that it then drops; searches all of ``triton.language``
for each launch; and makes a table of types for each look at one. What kernels compute, read and write stays the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from replayed_builtins import Recorder, name_of, replayed, rest_of
from triton.runtime import interpreter

BOOL = np.dtype(bool)


def speed_up() -> None:
    """Change the interpreter of this process; parts that this release of Triton does not have are left as they are."""
    builder: Any = interpreter.interpreter_builder
    options = builder.options
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "interpreter_semantic"):
        patch_for_good(Recorder(builder))
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)
    if hasattr(interpreter, "_validate_np_data_size"):
        interpreter.TensorHandle.__init__ = unchecked
        interpreter.InterpreterBuilder.binary_op = binary_op
        interpreter.InterpreterBuilder.create_expand_dims = create_expand_dims


def patch_for_good(recorder: Recorder) -> None:
    """Change ``triton.language`` for the interpreter once, instead of before and after each launch."""
    patch, make = interpreter._patch_lang, tl.tensor.__init__

    def patch_attribute(holder: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        scope.set_attr(holder, name, replayed(member, recorder))

    def patch_first(function: Any) -> Any:
        interpreter._patch_attr = patch_attribute
        patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        tl.tensor.__init__ = with_one_type_each(make)
        for name in ("__bool__", "__index__"):
            setattr(tl.tensor, name, looked_at(getattr(tl.tensor, name), recorder))
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_first


def looked_at(look: Callable[[Any], Any], recorder: Recorder) -> Callable[[Any], Any]:
    def tell(tensor: Any) -> Any:
        if recorder.active and tensor.handle.data.size == 1:
            recorder.look(tensor.handle)
        return look(tensor)

    return tell


def with_one_type_each(make: Callable[..., None]) -> Callable[..., None]:
    """Tensors of equal types share one object for the type, and what follows of it."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def initialise(tensor: Any, handle: Any, type: Any) -> None:
        name = name_of(type)
        if name not in known:
            make(tensor, handle, type)
            known[name] = rest_of(tensor)
        tensor.__dict__.update(known[name])
        tensor.handle = handle

    return initialise


def remembered(find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """The dtype of NumPy for a type of Triton: that of its elements, by their name."""
    known: dict[str, np.dtype] = {}

    def look_up(kind: Any) -> np.dtype:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if element.name not in known:
            known[element.name] = find(element)
        return known[element.name]

    return look_up


def unchecked(handle: Any, data: np.ndarray, dtype: Any, attr: dict[str, Any] | None = None) -> None:
    """A value of the interpreter, without the check that NumPy's elements are no wider than Triton's."""
    handle.data, handle.dtype, handle.attr = data, dtype, {} if attr is None else attr


def binary_op(builder: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    """As the interpreter's, which asks for the types at each step."""
    left, right, kind = lhs.data, rhs.data, lhs.dtype.scalar
    if left.dtype == BOOL and right.dtype == BOOL:
        return interpreter.TensorHandle((op(left.astype(np.int8), right.astype(np.int8)) & 1).astype(BOOL), kind)
    output = op(left, right)
    dtype = interpreter._get_np_dtype(kind)
    return interpreter.TensorHandle(output.astype(dtype) if output.itemsize > dtype.itemsize else output, kind)


def create_expand_dims(builder: Any, arg: Any, axis: int) -> Any:
    shape = arg.data.shape
    return interpreter.TensorHandle(arg.data.reshape(*shape[:axis], 1, *shape[axis:]), arg.dtype.scalar)
