"""The settings by which layers with full attention choose the keys of a generation step: Twilight and RefreshKV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.section import Section, Tokens, TokensOrNone

Share = Annotated[float, Field(gt=0, le=1)]

ONE, BY_LAYER = "one for all layers", "by layer"
"""The forms of ``p``, which pydantic puts into the place of an error."""


def _form(value: Any) -> str:
    return BY_LAYER if isinstance(value, Mapping) else ONE


class Prune(Section):
    """Twilight (2502.02770): keep the fewest keys that hold a share ``p`` of the estimated softmax weight."""

    p: Annotated[
        Annotated[Share, Tag(ONE)] | Annotated[dict[Annotated[int, Field(ge=0)], Share], Tag(BY_LAYER)],
        Discriminator(_form),
    ] = 0.9
    """Share of the weight of the candidates; 1 keeps them all. A mapping such as {2: 0.9, 3: 0.95} gives each layer
    that reads fewer keys its own."""
    group: Literal["union", "max", "mean"] = "union"
    """The keys that the query heads of a KV head share: the union of their sets, or the set of their largest or mean
    weight."""
    min_keys: Tokens = 64
    """Keys that a head keeps at least."""

    def p_of(self, layer: int) -> float:
        """The share of one layer that reads fewer keys."""
        return self.p[layer] if isinstance(self.p, dict) else self.p


class Refresh(Section):
    """RefreshKV (2411.05787): choose keys every few tokens and read the same ones in between."""

    every: Annotated[int, Field(ge=1)] = 8
    """Tokens between two choices."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Choose again only where the cosine similarity of the layer's mean query to that of the last choice has fallen to
    this or below; None chooses every time."""
    keep: Annotated[int | float, Field(gt=0)] | None = None
    """Keys of a choice: a number of tokens, or below 1 a share of the prompt. None takes what ``prune`` keeps; with
    ``choose: full`` both may be given, and ``keep`` is then the most that ``prune`` keeps."""
    staggered: bool = True
    """Neighbouring layers choose at different tokens, so that no step is much slower than others."""
    choose: Literal["codes", "full"] = "codes"
    """How a token chooses. ``codes`` estimates the weights of keys from their codes of 4 bits, and the token reads what
    it has chosen. ``full`` makes it read all keys and choose by their exact weights. The last token of a prompt then
    chooses for the tokens behind it, as in the paper and in training with ``attention.method: recycled``."""


class Calibrated(Section):
    """How ``sparsetrain calibrate`` found the section, and of which model."""

    name: str
    """What the model was called."""
    model: dict[str, Any]
    """Fields of its config, by which another model is told apart."""
    error: Annotated[float, Field(ge=0)]
    """What a layer's output may lose in the mean: the norm of the error over the norm of the output."""
    data: str
    """The text that it was measured on."""
    tokens: Tokens
    """Tokens of each text."""
    rows: Annotated[int, Field(ge=1)]
    """Rows that were measured in each layer."""


class Decode(Section):
    """The ``decode`` section: what layers with full attention read in a step of generation."""

    select: Literal["full", "quest", "channels", "own"] = "full"
    """The candidates: all keys, the pages of 16 tokens whose bounds allow the largest logits (quest, 2406.10774), the
    tokens with the largest logits by few channels of their keys (channels: Double Sparsity, 2408.07092), or the keys
    that a block pattern or SparseK reads in any case (own)."""
    candidates: Annotated[int | float, Field(gt=0)] | None = None
    """Tokens that quest or channels pass on, at least 16, in pages of 16 of quest, or below 1 a share of the prompt.
    None means 8,192."""
    channels: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Channels of a key that select=channels looks at, an even number."""
    heavy_channels: dict[Annotated[int, Field(ge=0)], list[list[Annotated[int, Field(ge=0)]]]] | None = None
    """These channels by layer and KV head, as ``sparsetrain calibrate`` finds them; None takes those in which the keys
    of a prompt differ most."""
    prune: Prune | None = None
    refresh: Refresh | None = None
    sinks: TokensOrNone = 4
    """First tokens, which every step reads."""
    recent: TokensOrNone = 64
    """Last tokens, which every step reads; at least all since the last choice. 0 needs ``refresh.choose: full``."""
    dense_layers: list[Annotated[int, Field(ge=0)]] = [0, 1]
    """Layers that read all keys, as the published methods leave the first two."""
    calibrated: Calibrated | None = None
    """Where ``sparsetrain calibrate`` made the section: it is then for that model alone."""

    @model_validator(mode="after")
    def _check_selection(self) -> Decode:
        if self.select in ("full", "own") and self.candidates is not None:
            every = "all keys" if self.select == "full" else "all keys that the method reads"
            raise ValueError(
                f"candidates={self.candidates} is for select=quest or channels; with select={self.select} {every} are "
                "candidates"
            )
        few = self.candidates
        if few is not None and few >= 1 and (few < 16 or few % 1):
            raise ValueError(f"candidates={few} must be a whole number of 16 tokens or more, or a share below 1")
        if self.select == "own" and self.prune is None:
            raise ValueError("select=own reads what the method reads and nothing else is set; give prune")
        if self.select != "channels" and "channels" in self.model_fields_set and self.channels != 16:
            raise ValueError(f"channels={self.channels} is for select=channels, not select={self.select}; drop it")
        if self.select != "channels" and self.heavy_channels is not None:
            raise ValueError(f"heavy_channels is for select=channels, not select={self.select}; drop it")
        if self.heavy_channels is not None:
            _check_heavy(self.heavy_channels, self.channels)
        if self.select == "full" and self.prune is None and self.refresh is None:
            raise ValueError(
                "select=full reads all keys and nothing else is set; give prune, refresh, select=quest or "
                "select=channels"
            )
        return self

    @model_validator(mode="after")
    def _check_choices(self) -> Decode:
        keep = None if self.refresh is None else self.refresh.keep
        if self.refresh is not None and keep is None and self.prune is None and self.select == "full":
            raise ValueError("refresh needs to know how many keys a choice has; give refresh.keep or prune.p")
        whole = self.refresh is not None and self.refresh.choose == "full"
        if whole and self.select != "full":
            raise ValueError(
                f"refresh.choose=full reads all keys where it chooses, and select={self.select} would pass on few of "
                "them; use select=full, or choose=codes"
            )
        if self.recent == 0 and not whole:
            raise ValueError("recent=0: a step has to read its own token, which is the last; use 1 or more")
        if keep is not None and self.prune is not None and not whole:
            raise ValueError("refresh.keep and prune both say how many keys a choice has; drop one of them")
        if isinstance(keep, float) and keep >= 1 and keep % 1:
            raise ValueError(f"refresh.keep={keep} must be a whole number of tokens, or a share below 1")
        if isinstance(keep, float) and keep == 1:
            raise ValueError("refresh.keep=1.0 would be one token, not the whole prompt; write 1, or a share below 1")
        return self

    def candidate_tokens(self, prompt: int) -> int:
        """Tokens that a selector passes on behind a prompt of so many tokens."""
        if self.candidates is None:
            return 8192
        return max(16, int(self.candidates * prompt if self.candidates < 1 else self.candidates))


def _check_heavy(heavy: dict[int, list[list[int]]], count: int) -> None:
    """Every KV head names ``count`` different channels, ascending."""
    for layer, heads in heavy.items():
        if not heads:
            raise ValueError(f"heavy_channels of layer {layer} names no KV head; give {count} channels of each")
        for head, channels in enumerate(heads):
            if len(channels) != count or sorted(set(channels)) != channels:
                raise ValueError(
                    f"heavy_channels of layer {layer}, KV head {head} must be {count} different channels in ascending "
                    f"order, as channels={count} says, and not {channels}"
                )


PUBLISHED: dict[str, dict[str, Any]] = {
    "twilight": {"select": "quest", "candidates": 8192, "prune": {"p": 0.85}},
    "twilight-full": {"select": "full", "prune": {"p": 0.95}},
    "quest": {"select": "quest", "candidates": 4096},
    "double-sparsity": {"select": "channels", "channels": 16, "candidates": 0.0625},
    "refreshkv": {"refresh": {"every": 5, "similarity": 0.85, "keep": 0.125, "staggered": False}, "dense_layers": []},
    "recycled": {"refresh": {"every": 50, "keep": 4096, "staggered": False}, "dense_layers": []},
}
"""Published settings by name: Twilight over Quest and over all keys (2502.02770, section 5), Quest (2406.10774),
Double Sparsity (2408.07092: one token in 16), RefreshKV (2411.05787, section 4) and the fixed schedule of its
first version, Recycled Attention."""


def parse_decode(given: str | Mapping[str, Any] | Decode) -> Decode:
    """A decode section.

    Args:
        given: one of :data:`PUBLISHED` by name, or the fields.

    Raises:
        ModelError: the name is not known, or a field is wrong; the message names it.
    """
    if isinstance(given, Decode):
        return given
    if not isinstance(given, str | Mapping):
        raise ModelError(
            f"decode={given!r:.60} is neither a name such as twilight nor a mapping such as "
            '{"select": "quest", "prune": {"p": 0.9}}'
        )
    if isinstance(given, str):
        if given not in PUBLISHED:
            raise ModelError(
                f"decode={given} is not known; choose one of {', '.join(PUBLISHED)}, or give its fields, "
                "or the path of a .yaml or .json file that has them"
            )
        given = PUBLISHED[given]
    _refuse_truth_values(given, "decode")
    try:
        return Decode.model_validate(dict(given))
    except ValidationError as error:
        faults = [f"{'.'.join(('decode', *_place(fault['loc'])))}: {_words(fault)}" for fault in error.errors()]
        raise ModelError("; ".join(dict.fromkeys(faults))) from error


def _words(fault: Any) -> str:
    """What is wrong with a value, and the value."""
    value, place = repr(fault["input"]), str(next(iter(fault["loc"]), ""))
    if len(value) > 60:
        value = f"{value[:60]}..."
    match fault["type"]:
        case "value_error":
            return str(fault["msg"]).removeprefix("Value error, ")
        case "extra_forbidden":
            sections: dict[str, type[Section]] = {"prune": Prune, "refresh": Refresh}
            names = ", ".join(sections.get(place, Decode).model_fields)
            return f"there is no such field; choose one of {names}"
        case "model_type":
            return (
                f"must be a mapping such as {{{'every: 8' if fault['loc'][0] == 'refresh' else 'p: 0.9'}}}, not {value}"
            )
        case "list_type":
            return f"must be a list such as [0, 1], not {value}"
    return f"{fault['msg'].replace('Input should be', 'must be').partition(', unable to')[0]}, not {value}"


def _refuse_truth_values(section: Mapping[str, Any], place: str) -> None:
    """Pydantic takes ``true`` for the number 1."""
    for name, value in section.items():
        if isinstance(value, Mapping) and name in ("prune", "refresh", "p"):
            _refuse_truth_values(value, f"{place}.{name}")
        elif isinstance(value, bool) and name != "staggered":
            raise ModelError(f"{place}.{name}: {str(value).lower()} is no value of this field; give a number or a name")


def _place(location: tuple[int | str, ...]) -> list[str]:
    return [str(part) for part in location if part not in (ONE, BY_LAYER, "[key]", "int", "float")]
