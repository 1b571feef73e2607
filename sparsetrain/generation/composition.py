"""The combinations of a decode section with attention methods, with a reason for each that is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsetrain.errors import ModelError
from sparsetrain.generation.candidates import GRANULE
from sparsetrain.methods.base import Method
from sparsetrain.methods.recycled.method import RecycledMethod
from sparsetrain.methods.sparsek.memory import SparseKMemory
from sparsetrain.methods.static import StaticMethod
from sparsetrain.patterns import SlidingPattern

if TYPE_CHECKING:
    from sparsetrain.generation.settings import Decode

FULL, RECYCLED, WINDOW = "full attention", "recycled attention", "a sliding window"
PATTERN, LEARNED = "a block pattern", "learned selections"

PARTS = ("full", "quest", "channels", "own", "prune", "refresh")
"""The parts of a section: the values of ``select``, and what may be added."""

_CHOSEN = "the method has chosen which keys it still has, and select=own chooses among them"
_LISTED = "the pattern says which blocks are read, and select=own chooses among them"
_ALL = "it reads all keys, which select=full, quest and channels choose from"
_FEW = "a window has no keys to choose from: it reads few and all of them"

REASONS = {
    (FULL, "own"): _ALL,
    (RECYCLED, "own"): _ALL,
    (WINDOW, "full"): _FEW,
    (WINDOW, "quest"): _FEW,
    (WINDOW, "channels"): _FEW,
    (WINDOW, "own"): _FEW,
    (WINDOW, "prune"): "a window costs less than the estimate that would prune it",
    (WINDOW, "refresh"): "a window costs nothing to know, so there is nothing to use again",
    (PATTERN, "full"): _LISTED,
    (PATTERN, "quest"): _LISTED,
    (PATTERN, "channels"): _LISTED,
    (PATTERN, "refresh"): "the lists of a pattern cost nothing, so there is nothing to use again",
    (LEARNED, "full"): _CHOSEN,
    (LEARNED, "quest"): _CHOSEN,
    (LEARNED, "channels"): _CHOSEN,
    (LEARNED, "refresh"): "the method chooses for each key once, so there is nothing to use again",
}
"""By the attention of a layer and the part of the section: why the layer does not take it. All else composes."""


def attention_kind(method: Method | None, window: int | None) -> str:
    """The kind of attention of a layer, one of the constants of this module.

    Args:
        method: how it attends; None where it stays as the model made it.
        window: its sliding window in tokens, where it stays as the model made it.
    """
    if method is None:
        return FULL if window is None else WINDOW
    if isinstance(method, RecycledMethod):
        return RECYCLED
    if method.decodes_all or (method.dense and not method.extra_inputs):
        return FULL
    if isinstance(method, StaticMethod):
        return WINDOW if type(method.pattern) is SlidingPattern else PATTERN
    return LEARNED


def check_composition(kinds: Iterable[tuple[int, str]], decode: Decode) -> list[int]:
    """The layers that take a decode section.

    Args:
        kinds: index and :func:`attention_kind` of each layer.

    Raises:
        ModelError: there is none, ``dense_layers`` names one that does not exist,
            or ``prune.p`` is by layer and not of these; the message says why.
    """
    layers = dict(kinds)
    able = [index for index, kind in layers.items() if not any((kind, part) in REASONS for part in parts_of(decode))]
    taken = [index for index in able if index not in decode.dense_layers]
    usual = type(decode).model_fields["dense_layers"].get_default()
    beyond = [index for index in decode.dense_layers if index > max(layers)]
    if beyond and decode.dense_layers != usual:
        raise ModelError(
            f"decode.dense_layers names layer {beyond[0]}, and the last layer of this model with attention is "
            f"{max(layers)}; drop it"
        )
    if taken:
        _check_by_layer(taken, decode)
        return taken
    if able:
        raise ModelError(
            f"decode.dense_layers={decode.dense_layers} leaves no layer to read fewer keys in: those that can are "
            f"{', '.join(map(str, able))}; shorten the list"
        )
    kind = next(iter(layers.values()))
    part = next(part for part in parts_of(decode) if (kind, part) in REASONS)
    name = f"decode.{part}" if part in ("prune", "refresh") else f"decode.select={part}"
    remedy = (
        "leave decode out" if kind in (FULL, RECYCLED) else "leave decode out, or train with attention.dense_layers"
    )
    raise ModelError(
        f"{name} does not go with {kind}, which the layers of this model have: {REASONS[kind, part]}; {remedy}"
    )


def check_own(index: int, method: Method | None) -> None:
    """Refuse ``select=own`` for a layer whose keys are not in pages of 16 tokens, nor SparseK's.

    Raises:
        ModelError: says why.
    """
    if isinstance(method, StaticMethod):
        if type(method).attend is not StaticMethod.attend:
            raise ModelError(
                f"decode.select=own: {type(method).__name__} of layer {index} attends in a way of its own, whose keys "
                "cannot be listed; leave decode out"
            )
        if method.pattern.block % GRANULE:
            raise ModelError(
                f"decode.select=own: the pattern of layer {index} has blocks of {method.pattern.block} tokens, and "
                f"keys are chosen in pages of {GRANULE}; leave decode out, or train with attention.block a multiple of "
                f"{GRANULE}"
            )
    elif method is None or not isinstance(method.memory(), SparseKMemory):
        raise ModelError(
            f"decode.select=own: {type(method).__name__} of layer {index} has no keys that can be chosen from; leave "
            "decode out"
        )


def parts_of(decode: Decode) -> list[str]:
    """Those of :data:`PARTS` that a section uses."""
    chosen = {"prune": decode.prune is not None, "refresh": decode.refresh is not None}
    added = [part for part, used in chosen.items() if used]
    # The default is the last to be named as a reason.
    return [*added, decode.select] if decode.select == "full" else [decode.select, *added]


def _check_by_layer(taken: list[int], decode: Decode) -> None:
    """Refuse what is given by layer and leaves out a layer, or names one that reads all its keys."""
    listed = ", ".join(map(str, taken))
    prune = decode.prune
    if prune is not None and isinstance(given := prune.p, dict):
        if strange := sorted(given.keys() - set(taken)):
            raise ModelError(
                f"decode.prune.p={given[strange[0]]} for layer {strange[0]} has no effect: the layers that read fewer "
                f"keys are {listed}; drop it"
            )
        if lost := sorted(set(taken) - given.keys()):
            raise ModelError(
                f"decode.prune.p says nothing of layer {lost[0]}: name all layers that read fewer keys ({listed}), or "
                "give one number for all"
            )
    if decode.heavy_channels is not None and decode.heavy_channels.keys() != set(taken):
        named = ", ".join(map(str, sorted(decode.heavy_channels)))
        raise ModelError(
            f"decode.heavy_channels names layers {named}, and the layers that read fewer keys are {listed}: name "
            "these, or drop it to take the channels from each prompt"
        )
