"""Decoding steps that choose keys: Twilight over all keys and over Quest's pages, Quest, Double Sparsity, and choices
used again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetrain.bench.contenders.base import Contender, Prepared
from sparsetrain.bench.measure import Unavailable
from sparsetrain.generation.candidates import GRANULE
from sparsetrain.generation.choices import Choices
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.memories import PAGE
from sparsetrain.generation.pages import Attend
from sparsetrain.generation.settings import Decode
from sparsetrain.patterns import FullPattern, Pattern

if TYPE_CHECKING:
    from sparsetrain.bench.decoding import DecodeProblem, Layer

BOTH = ("cuda", "cpu")
CODES = 4
"""Bytes of a key's scale and offset beside its codes of half a byte a channel."""


class StandingMemory(ListedMemory):
    """A memory that stays as long as it is: each step writes the newest token again, so that all steps are the same.
    When a choice is due is known on the host: as many steps are captured together as use one choice."""

    def __init__(self, pattern: Pattern, attend: Attend, decode: Decode, index: int, **room: Any) -> None:
        super().__init__(pattern, attend, decode, index, **room)
        if decode.refresh is not None:
            self._choices = Choices(decode.refresh, index, rollback=0, static=False)

    def _append(self, key: Tensor, value: Tensor) -> None:
        self._tensors()[3].add_(0)  # as many launches as a step that counts its token
        self._append_tokens(key, value, self._tensors()[2])


def _prepare(decode: Callable[[DecodeProblem], dict[str, Any]], problem: DecodeProblem, layer: Layer) -> Prepared:
    """A layer's memory of all tokens; a step is what it does in generation, the writing of the new token included."""
    settings, last, blank = Decode(**decode(problem)), problem.length - 1, nn.Identity()
    if settings.select == "own" and problem.pattern.block % GRANULE:
        raise Unavailable(f"keys are chosen in pages of {GRANULE}, which do not divide --block {problem.pattern.block}")
    pattern = problem.pattern if settings.select == "own" else FullPattern(PAGE)
    memory = StandingMemory(pattern, _no_attention, settings, 0, max_length=problem.length)
    memory.attend(blank, layer.key, layer.key, layer.value, starts=None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return memory.attend(blank, query, key[:, :, last:], value[:, :, last:], starts=None)

    every = 1 if settings.refresh is None else settings.refresh.every
    return Prepared(
        attend,
        steps=every,
        visible=lambda: _visible(problem, memory, *memory._lists(layer.query, {})),
        beside=_bytes_beside(problem, settings) / every,
    )


def _no_attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The prompt only fills the memory."""
    return query


def _visible(problem: DecodeProblem, memory: ListedMemory, lists: Tensor, counts: Tensor) -> Tensor:
    """The keys that a step reads, bool ``[batch, kv_heads, length]``."""
    listed = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    seen = torch.zeros(*lists.shape[:2], problem.length + 1, dtype=torch.bool, device=lists.device)
    seen.scatter_(2, torch.where(listed, lists, problem.length).long(), True)
    seen = seen[..., : problem.length]
    always = memory._always()
    seen[..., : always.sinks] = True
    recent = always.lengths - always.recent
    return seen | (torch.arange(problem.length, device=lists.device) >= recent[:, None, None])


def _bytes_beside(problem: DecodeProblem, settings: Decode) -> int:
    """Bytes of codes, bounds and labels that one layer's choice reads."""
    total, candidates = 0, problem.length
    if settings.select == "quest":
        total += -(-problem.length // GRANULE) * 2 * problem.head_dim * problem.dtype.itemsize
        candidates = min(candidates, -(-settings.candidate_tokens(problem.length) // GRANULE) * GRANULE)
    if settings.select == "own":
        candidates = problem.listed_keys
    if settings.select == "channels":
        total += problem.length * (settings.channels // 2 + CODES)
        candidates = min(candidates, settings.candidate_tokens(problem.length) + settings.sinks + settings.recent)
    if settings.prune is not None:
        total += candidates * (problem.head_dim // 2 + CODES)
    return total * problem.batch * problem.kv_heads


def _twilight(problem: DecodeProblem) -> dict[str, Any]:
    return {"prune": {"p": problem.p}}


def _quest(problem: DecodeProblem) -> dict[str, Any]:
    return {"select": "quest", "candidates": problem.candidates}


def _channels(problem: DecodeProblem) -> dict[str, Any]:
    return {"select": "channels", "channels": min(16, problem.head_dim // 2), "candidates": problem.candidates}


def _own(problem: DecodeProblem) -> dict[str, Any]:
    return _twilight(problem) | {"select": "own"}


STEPS = tuple(
    Contender(name, f"sparsetrain, {title}", "chosen", partial(_prepare, decode), BOTH)
    for name, title, decode in (
        ("twilight", "Twilight, all keys", _twilight),
        ("twilight-quest", "Twilight, Quest's pages", lambda problem: _twilight(problem) | _quest(problem)),
        ("quest", "Quest", _quest),
        ("channels", "Double Sparsity", _channels),
        ("twilight-channels", "Twilight, by channels", lambda problem: _twilight(problem) | _channels(problem)),
        ("twilight-own", "Twilight, PowerAttention's keys", _own),
        ("refresh", "Twilight, used again", lambda problem: _twilight(problem) | {"refresh": {"every": problem.every}}),
    )
)
