"""Read the keys of a turn that select its loss, in the usual formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsetrain.data.values import MalformedRow, described

Learned = bool | tuple[tuple[int, int], ...]
"""All of a turn, nothing of it, or half-open spans of characters of its content."""

SWITCHES = {
    "train": True,
    "training": True,
    "weight": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
}
"""Keys that say whether a turn is learned (axolotl, OpenAI, ms-swift, torchtune), and what 1 or true means."""

UNCLEAR = "mask"
"""A key that leaves a turn out in some tools, and in others is what is learned of it."""

DETAILS = ("train_detail", "training_detail")
"""axolotl's parts of a turn: ``[{begin_offset, end_offset, train}, ...]`` in characters, both ends included."""


def learned_of(keys: dict[str, Any], role: str, content: str, turn: str) -> Learned:
    """The learned part of a turn; its keys are removed.

    Raises:
        MalformedRow: Two keys disagree, or a key's value or meaning is not clear.
    """
    if UNCLEAR in keys:
        raise MalformedRow(
            f"{turn} has {UNCLEAR!r}, and tools differ in whether that leaves it out; write train: true or false, "
            f"or ignore: [{UNCLEAR}] learns what the assistant says"
        )
    said = {key: _switch(keys.pop(key), key, turn) == meaning for key, meaning in SWITCHES.items() if key in keys}
    if len(set(said.values())) > 1:
        raise MalformedRow(f"{turn} says by {' and '.join(said)} that it is learned, and that it is not")
    whole = next(iter(said.values()), role == "assistant")
    details = {key: keys.pop(key) for key in DETAILS if key in keys}
    for key, value in details.items():
        if value:
            if said and not whole:
                raise MalformedRow(f"{turn} says by {next(iter(said))} that it is not learned, and has {key}")
            return _parts(value, content, f"{key} of {turn}")
    return whole


def _switch(value: Any, key: str, turn: str) -> bool:
    if value not in (0, 1):
        raise MalformedRow(
            f"{key} of {turn} is {value!r}; a turn is learned (1, true) or not (0, false), all of them alike"
        )
    return bool(value)


def _parts(value: Any, content: str, name: str) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list):
        raise MalformedRow(f"{name} is {described(value)}, not a list of parts")
    spans = []
    for part in value:
        begin, end, train = (
            (part.get("begin_offset"), part.get("end_offset"), part.get("train", True))
            if isinstance(part, Mapping)
            else (None, None, None)
        )
        if not isinstance(begin, int) or not isinstance(end, int) or train not in (0, 1):
            raise MalformedRow(f"{name} must hold {{begin_offset, end_offset, train}}, not {part!r}")
        if not 0 <= begin <= end < len(content):
            raise MalformedRow(f"{name} marks characters {begin} to {end} of a text of {len(content)}")
        if train:
            spans.append((begin, end + 1))
    return tuple(sorted(spans))
