"""What a function of ``triton.language`` asks of Triton's interpreter, noted once and asked for again.

``a + b`` in a kernel checks, casts and broadcasts by the types of ``a`` and ``b``; then it asks the interpreter's
builder for one or two operations of NumPy, which take a tenth of the time. Types, shapes and constants decide all that
is asked for, so the first call with them is noted, and later ones ask the builder for the same without the rest. Where
a function looks at a value (a scalar mask), what it saw decides too. What cannot be noted is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from operator import itemgetter
from typing import Any, NamedTuple

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

STATEFUL = ("program", "load", "store", "atomic", "print", "assert", "assume", "barrier", "descriptor")
"""In names of what the builder gives that depends on more than its arguments, or that is asked for its effect."""


class NotKnown(Exception):
    """An argument that is neither a tensor nor a constant."""


class Result(NamedTuple):
    """A tensor that is returned: where its value is, and the rest of it."""

    place: int
    template: dict[str, Any]


class Plan(NamedTuple):
    """What is asked of the builder: functions with the places of their arguments among all values, in order."""

    constants: list[Any]
    steps: list[tuple[Callable[..., Any], Callable[[list[Any]], Sequence[Any]]]]
    result: Result | tuple[Result, ...] | None

    def replay(self, tensors: list[Any]) -> Any:
        values = [tensor.handle for tensor in tensors] + self.constants
        for function, arguments in self.steps:
            values.append(function(*arguments(values)))
        if self.result is None:
            return None
        if self.result.__class__ is Result:
            return made(values[self.result.place], self.result.template)
        return tuple(made(values[place], template) for place, template in self.result)


class Look(NamedTuple):
    """Of these tensors among the arguments, the values were looked at: they decide which plan it is."""

    places: tuple[int, ...]


def made(handle: TensorHandle, template: dict[str, Any]) -> Any:
    tensor = tl.tensor.__new__(tl.tensor)
    tensor.__dict__.update(template)
    tensor.handle = handle
    return tensor


class Recorder:
    """The interpreter's builder, which notes what it is asked for between :meth:`start` and :meth:`plan`."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.active = False

    def start(self, handles: list[TensorHandle]) -> None:
        self.active, self.whole = True, True
        self.origins: dict[int, tuple[str, int]] = {id(handle): ("given", i) for i, handle in enumerate(handles)}
        self.kept: list[Any] = [*handles]  # an id names an object only while it lives
        self.constants: list[Any] = []
        self.asked: list[tuple[Callable[..., Any], list[tuple[str, int]]]] = []
        self.looked: set[int] = set()
        self.given = len(handles)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._builder, name)
        if not name.startswith(("create_", "get_")) or name.endswith("_ty"):
            return member

        def ask(*arguments: Any) -> Any:
            result = member(*arguments)
            self.note(name, member, arguments, result)
            return result

        return ask

    def note(self, name: str, member: Callable[..., Any], arguments: tuple[Any, ...], result: Any) -> None:
        if result is None and name.startswith("get_"):
            return
        if result is not None and not isinstance(result, TensorHandle):
            self.whole = False
            return
        origins = [self.origin(argument) for argument in arguments]
        if all(kind == "constant" for kind, _ in origins) and not any(word in name for word in STATEFUL):
            self.origins[id(result)] = self.keep(result)
            return
        self.origins[id(result)] = ("asked", len(self.asked))
        self.kept.append(result)
        self.asked.append((member, origins))

    def origin(self, argument: Any) -> tuple[str, int]:
        if not isinstance(argument, TensorHandle):
            if isinstance(argument, (list, tuple)) and any(isinstance(each, TensorHandle) for each in argument):
                self.whole = False
            return self.keep(argument)
        if id(argument) not in self.origins:
            self.whole = False  # made by something else than the builder
            return self.keep(argument)
        return self.origins[id(argument)]

    def keep(self, value: Any) -> tuple[str, int]:
        self.constants.append(value)
        return "constant", len(self.constants) - 1

    def look(self, handle: TensorHandle) -> None:
        """The function that is noted decides by this value."""
        kind, place = self.origins.get(id(handle), ("", 0))
        if kind == "given":
            self.looked.add(place)
        elif kind != "constant":
            self.whole = False

    def plan(self, result: Any) -> Plan | None:
        """What was noted, for a function that returned ``result``."""
        tensors = result if isinstance(result, tuple) else (result,)
        if result is not None and not all(isinstance(each, tl.tensor) for each in tensors):
            return None
        if result is not None and not all(id(each.handle) in self.origins for each in tensors):
            return None
        if not self.whole:
            return None
        returned = [] if result is None else [self.origins[id(each.handle)] for each in tensors]
        used = {origin for origins in (*(origins for _, origins in self.asked), returned) for origin in origins}
        constants = sorted(i for kind, i in used if kind == "constant")
        place = {("given", i): i for i in range(self.given)}
        place |= {("constant", i): self.given + order for order, i in enumerate(constants)}
        place |= {("asked", i): len(place) + i for i in range(len(self.asked))}
        steps = [(member, places_of([place[origin] for origin in origins])) for member, origins in self.asked]
        results = tuple(Result(place[origin], rest_of(each)) for origin, each in zip(returned, tensors, strict=False))
        whole = results if isinstance(result, tuple) else results[0] if results else None
        return Plan([self.constants[i] for i in constants], steps, whole)


def places_of(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Picks the values at these places, as one sequence."""
    if len(places) < 2:
        return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))
    return itemgetter(*places)


def rest_of(tensor: Any) -> dict[str, Any]:
    return {name: value for name, value in tensor.__dict__.items() if name != "handle"}


def signature(argument: Any, tensors: list[Any]) -> Any:
    """What of an argument decides; tensors are added to ``tensors``. A type is named by its id: it lives for good."""
    kind = argument.__class__
    if kind is tl.tensor:
        tensors.append(argument)
        return id(argument.type)
    return constant(argument)


def constant(value: Any) -> Any:
    kind = value.__class__
    if value is None or kind in (int, bool, str):
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind is tl.constexpr:
        return kind, constant(value.value)
    if kind in (tuple, list):
        return kind, *map(constant, value)
    if kind is tl.tuple:
        return kind, *map(constant, value.values)
    if kind is slice:
        return kind, constant(value.start), constant(value.stop), constant(value.step)
    if isinstance(value, tl.dtype):
        return kind, *name_of(value)
    if isinstance(value, Enum):
        return kind, value
    raise NotKnown


def name_of(kind: Any) -> tuple[Any, ...]:
    scalar = kind.scalar
    return kind.__class__, kind.name, getattr(scalar, "address_space", None)


def replayed(member: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """A function of ``triton.language`` for the interpreter."""
    semantic: Any = interpreter.interpreter_semantic
    plans: dict[Any, Plan | Look | None] = {}

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        if recorder.active:
            return member(*args, **kwargs, _semantic=semantic)
        tensors: list[Any] = []
        try:
            key: Any = tuple([signature(each, tensors) for each in args])
            if kwargs:
                key = (key, *[(name, signature(each, tensors)) for name, each in kwargs.items()])
        except NotKnown:
            return member(*args, **kwargs, _semantic=semantic)
        start, plan = key, plans.get(key, NotKnown)
        if plan.__class__ is Look:
            key = (key, seen(tensors, plan.places))
            plan = plans.get(key, NotKnown)
        if plan.__class__ is Plan:
            return plan.replay(tensors)
        if plan is None:
            return member(*args, **kwargs, _semantic=semantic)
        return record(start, key, tensors, args, kwargs)

    def record(start: Any, key: Any, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Each tensor as if it were another than all others: x * x is a plan for x * y too.
        copies = [tl.tensor(TensorHandle(each.handle.data, each.handle.dtype), each.type) for each in tensors]
        rest = iter(copies)
        own_args = [next(rest) if each.__class__ is tl.tensor else each for each in args]
        own_kwargs = {name: next(rest) if each.__class__ is tl.tensor else each for name, each in kwargs.items()}
        recorder.start([each.handle for each in copies])
        semantic.builder = recorder
        try:
            result = member(*own_args, **own_kwargs, _semantic=semantic)
        finally:
            semantic.builder = interpreter.interpreter_builder
            recorder.active = False
        if places := tuple(sorted(recorder.looked)):
            looked: Any = plans.setdefault(start, Look(places))
            if looked.places != places:
                # Which values it looks at depends on what it sees.
                plans[start] = None
                return result
            key = (start, seen(tensors, places))
        plans[key] = recorder.plan(result)
        return result

    return call


def seen(tensors: list[Any], places: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(bool(tensors[place].handle.data.all()) for place in places)
