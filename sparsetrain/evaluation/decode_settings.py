"""The decode settings that are compared, each with one number by which it reads more or less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sparsetrain.errors import ModelError
from sparsetrain.generation.measured import MeasuredMemory, OracleMemory, WindowMemory
from sparsetrain.generation.settings import PUBLISHED, Decode, parse_decode

CONTEXT = 32768
"""Tokens for which published numbers of keys are meant."""
WIDTH = 128
"""Channels of the keys for which the published number of them is meant."""
SINKS = 4
OF_KVPRESS = ("streamingllm", "snapkv", "h2o")
"""Methods that drop keys of the prompt once and for all. kvpress has them, for transformers that sparsetrain has
left behind."""
LAST_KVPRESS, BELOW_TRANSFORMERS = "0.5.5", "5.3"
SHARES = [round(1 - 2 ** (-step / 4), 6) for step in range(1, 65)]
"""The p that are tried, from 0.16 to 0.99998."""


@dataclass(frozen=True)
class Setting:
    """A way to choose keys.

    Args:
        name: of the row.
        memory: what a layer keeps.
        section: what it reads in a text of so many tokens.
        knob: the field by which it reads more or less: ``prune.p``, ``refresh.keep``, ``candidates`` or ``recent``.
        published: whether ``section`` is a published one.
        fitted: whether it is measured at budgets too; otherwise only as it is.
    """

    name: str
    memory: type[MeasuredMemory]
    section: dict[str, Any]
    knob: str
    published: bool
    fitted: bool = True

    @property
    def chooses(self) -> bool:
        """Whether it is a decode section, and no window or oracle."""
        return self.memory is MeasuredMemory

    def with_fields(self, label: str, fields: Mapping[str, Any]) -> Setting:
        """The same with other fields, measured as it is.

        Args:
            label: its name then.
            fields: by their dotted names, such as ``prune.p``. Numbers of keys are of these texts.

        Raises:
            ModelError: there is no such field, or its value is wrong.
        """
        section = deepcopy(self.section)
        for name, value in fields.items():
            if not self.chooses and name not in (self.knob, "sinks", "recent"):
                raise ModelError(f"--setting {label}: {self.name} has {self.knob}, sinks and recent, but no {name}")
            part, _, field = name.rpartition(".")
            inner = section.setdefault(part, {}) if part else section
            if not isinstance(inner, dict):
                raise ModelError(f"--setting {label}: there is no field {name}")
            inner[field] = value
        try:
            parse_decode(section)
        except ModelError as error:
            raise ModelError(f"--setting {label}: {error}") from error
        return replace(self, name=label, section=section, published=True, fitted=False)

    def values(self, tokens: int) -> list[Any]:
        """The numbers that are tried, ascending: of keys those in steps of a 128th of the text."""
        if self.knob == "prune.p":
            return [*SHARES, 1.0]
        least, step = 1, max(1, tokens // 128)
        if self.knob == "candidates":
            # Quest passes on whole pages, and 16 tokens are the least of both selectors.
            least, step = 16, -(-step // 16) * 16 if self.section["select"] == "quest" else step
        return list(range(least, tokens + step, step))

    def decode(self, value: Any = None) -> Decode:
        """The section, with another number where one is given."""
        section = deepcopy(self.section)
        if value is not None:
            part, _, field = self.knob.rpartition(".")
            (section[part] if part else section)[field] = value
        return parse_decode(section)


def settings(tokens: int, dense_layers: list[int], width: int) -> list[Setting]:
    """All settings for texts of ``tokens`` tokens, the baselines first, the oracles last.

    Published numbers of keys become the same shares of a shorter text, and those of channels the same shares of
    narrower keys. The last tokens that every step reads are a 32nd of the text and ``prune.min_keys`` a 64th, at most
    the 64 of both.

    Args:
        width: channels of a key.
        dense_layers: layers that read everything, the same for all.
    """
    beside = {"sinks": SINKS, "recent": max(1, min(64, tokens // 32)), "dense_layers": dense_layers}
    exact = {"sinks": 0, "recent": 1, "dense_layers": dense_layers}
    # Sections of a window and of oracles choose nothing by themselves: their memories do.
    window = {"select": "quest", "candidates": 16, **beside}
    top_k = {"refresh": {"every": 1, "keep": 1, "staggered": False}, **exact}
    top_p = {"prune": {"p": 0.5, "min_keys": 1}, **exact}
    published = []
    for name, fields in PUBLISHED.items():
        section = _scaled({**deepcopy(fields), **beside}, tokens / CONTEXT, tokens)
        if "channels" in section:
            section["channels"] = max(2, min(section["channels"], section["channels"] * width // WIDTH // 2 * 2))
        published.append(Setting(name, MeasuredMemory, section, _knob(section), True))
    return [
        Setting("window", WindowMemory, window, "recent", False),
        *published,
        Setting("oracle-top-k", OracleMemory, top_k, "refresh.keep", False),
        Setting("oracle-top-p", OracleMemory, top_p, "prune.p", False),
    ]


@dataclass(frozen=True)
class Asked:
    """A setting that is asked for: its name, and fields of its own."""

    label: str
    name: str
    fields: Mapping[str, Any]


def chosen_settings(asked: Sequence[Asked], known: Sequence[Setting]) -> list[Setting]:
    """The settings that are asked for; of none, all.

    Raises:
        ModelError: there is no such setting, and says which there are; of a method of kvpress, why it has no row; or it
            is asked for twice.
    """
    by_name = {setting.name: setting for setting in known}
    found: dict[str, Setting] = {}
    for each in asked:
        if each.name in OF_KVPRESS:
            raise ModelError(
                f"--setting {each.name} {_why_no_press()}; compare window, which is StreamingLLM's pattern"
            )
        if each.name not in by_name:
            raise ModelError(f"--setting {each.name} is not known; choose from {', '.join(by_name)}")
        if each.label in found:
            raise ModelError(f"--setting {each.label} is there twice; give it once")
        setting = by_name[each.name]
        found[each.label] = setting.with_fields(each.label, each.fields) if each.fields else setting
    return [*found.values()] or [*known]


def _why_no_press() -> str:
    try:
        found = f"kvpress {version('kvpress')} is installed"
    except PackageNotFoundError:
        found = "kvpress is not installed"
    return (
        f"is a method of kvpress, which has no rows here: its releases up to {LAST_KVPRESS} work with transformers "
        f"below {BELOW_TRANSFORMERS}, because they read the cache_position that later ones do not pass to a layer. "
        f"{found}, beside transformers {version('transformers')}"
    )


def _scaled(section: dict[str, Any], share: float, tokens: int) -> dict[str, Any]:
    """The section for a text of so many tokens, which are this share of those that it was published for."""

    def fewer(keys: int) -> int:
        return max(1, int(keys * min(1, share)))

    if (passed := section.get("candidates")) is not None:
        section["candidates"] = max(16, int(passed * tokens) if passed < 1 else fewer(passed))
    if "prune" in section:
        section["prune"]["min_keys"] = max(1, min(64, tokens // 64))
    keep = section.get("refresh", {}).get("keep")
    if keep is not None:
        section["refresh"]["keep"] = max(1, int(keep * tokens)) if keep < 1 else fewer(keep)
    return section


def _knob(section: dict[str, Any]) -> str:
    if "prune" in section:
        return "prune.p"
    return "refresh.keep" if "refresh" in section else "candidates"
