"""The combinations of a decode section with attention methods, with a reason for each that is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsetrain.errors import ModelError
from sparsetrain.methods.base import Method
from sparsetrain.methods.static import StaticMethod
from sparsetrain.patterns import SlidingPattern

if TYPE_CHECKING:
    from sparsetrain.generation.settings import Decode

FULL, WINDOW, PATTERN, LEARNED = "full attention", "a sliding window", "a block pattern", "learned selections"

REASONS = {
    (WINDOW, "select"): "a window has no keys to choose from: it reads few and all of them",
    (WINDOW, "prune"): "a window costs less than the estimate that would prune it",
    (WINDOW, "refresh"): "a window costs nothing to know, so there is nothing to use again",
    (PATTERN, "select"): "the pattern says which blocks are read",
    (PATTERN, "prune"): "estimates for the listed blocks cost more than they save",
    (PATTERN, "refresh"): "the lists of a pattern cost nothing, so there is nothing to use again",
    (LEARNED, "select"): "the method has chosen which keys it still has",
    (LEARNED, "prune"): "the few keys that are left cost less than their estimate",
    (LEARNED, "refresh"): "the method chooses for each key once, so there is nothing to use again",
}
"""By the attention of a layer and the part of the section: why the layer does not take it. Full attention takes all."""

PARTS = ("select", "prune", "refresh")


def attention_kind(method: Method | None, window: int | None) -> str:
    """The kind of attention of a layer, one of the constants of this module.

    Args:
        method: how it attends; None where it stays as the model made it.
        window: its sliding window in tokens, where it stays as the model made it.
    """
    if method is None:
        return FULL if window is None else WINDOW
    if method.dense and not method.extra_inputs:
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
    full = [index for index, kind in layers.items() if kind == FULL]
    taken = [index for index in full if index not in decode.dense_layers]
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
    if full:
        raise ModelError(
            f"decode.dense_layers={decode.dense_layers} leaves no layer to read fewer keys in: the layers with full "
            f"attention are {', '.join(map(str, full))}; shorten the list"
        )
    used = {"select": decode.select != "full", "prune": decode.prune is not None, "refresh": decode.refresh is not None}
    part = next(part for part in PARTS if used[part])
    kind = next(iter(layers.values()))
    raise ModelError(
        f"decode.{part} is for layers with full attention, and this model has none: its layers have {kind}, where "
        f"{REASONS[kind, part]}; leave decode out, or train with attention.dense_layers"
    )


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
