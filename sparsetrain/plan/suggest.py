"""Suggest changes for a recipe that does not fit, the cheapest first, until a combination fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsetrain.errors import SparsetrainError
from sparsetrain.plan.memory import estimate_memory
from sparsetrain.plan.setting import Setting
from sparsetrain.recipe.schema import Recipe

SHORTEST = 2048
"""Minimum tokens of a shorter row that is suggested."""

WORTH = 2**28
"""Minimum bytes that a suggested change must save."""

AT_ONCE = "eval.at_start=false"
"""Without an evaluation before training, ZeRO-3 shards the weights as they are read."""


@dataclass(frozen=True)
class Change:
    """One change, on top of those before it."""

    overrides: tuple[str, ...]
    """Overrides, as they are appended to the command line."""
    costs: str
    """A description of its cost."""
    saves: float
    """Peak memory in bytes with this change."""


@dataclass(frozen=True)
class Suggestion:
    """Changes in the order in which to try them, and the shortest combination found that fits."""

    changes: tuple[Change, ...]
    combination: tuple[str, ...]
    """The overrides of a combination that fits; empty if none does."""
    needed: float
    """Bytes that the combination needs; without one, what all changes together need."""


def suggest(
    setting: Setting,
    capacity: float,
    reload: Callable[[list[str]], Recipe],
    with_recipe: Callable[[Recipe], Setting],
) -> Suggestion:
    """Add one change after another until the recipe fits, then leave out those that are not needed.

    Args:
        reload: the recipe under overrides, raising what is wrong with them.
        with_recipe: the setting of a changed recipe on the same GPUs.
    """

    def needed(overrides: list[str]) -> float:
        return estimate_memory(with_recipe(reload(overrides))).needed

    at = estimate_memory(setting).needed
    changes: list[Change] = []
    taken: list[tuple[str, ...]] = []
    current = setting
    fits = False
    for overrides, costs in _candidates(setting):
        tried = [*_flat(taken), *overrides]
        try:
            current = with_recipe(reload(tried))
            after = estimate_memory(current).needed
        except SparsetrainError:
            continue
        if at - after < WORTH:
            continue
        changes.append(Change(overrides, costs, at - after))
        taken.append(overrides)
        at = after
        if after <= capacity:
            fits = True
            break
    if not fits:
        return Suggestion(tuple(changes), (), at)

    def fits_with(overrides: list[str]) -> bool:
        try:
            return needed(overrides) <= capacity
        except SparsetrainError:
            return False

    combination = _sparing(_flat(taken), fits_with)
    return Suggestion(tuple(changes), tuple(combination), needed(combination))


def _candidates(setting: Setting) -> Iterator[tuple[tuple[str, ...], str]]:
    """Changes from the least to the most expensive, and the cost of each."""
    recipe, shape = setting.recipe, setting.shape
    train, section = recipe.train, recipe.deepspeed
    micro = train.micro_batch
    if setting.second_models:
        nulls = tuple(f"{model.field}=null" for model in setting.second_models)
        yield nulls, "the first evaluation of the run chooses in place of that model"
    given = train.global_batch_sequences is not None or train.global_batch_tokens is not None
    while micro > 1:
        micro //= 2
        costs = "more accumulation; nothing else changes" if given else "a smaller global batch, as none is given"
        yield (f"train.micro_batch={micro}",), costs
    if train.activation_checkpointing == "none":
        yield ("train.activation_checkpointing=selective",), "recomputes each layer except its attention"
    if train.activation_checkpointing != "layer":
        yield ("train.activation_checkpointing=layer",), "recomputes each layer"
    for chunk in (4096, 1024):
        if train.loss_chunk is None or train.loss_chunk > chunk:
            yield (f"train.loss_chunk={chunk}",), "smaller products with the output projection"
    for chunk in (16384, 4096):
        if (train.mlp_chunk or setting.tokens) > chunk:
            yield (f"train.mlp_chunk={chunk}",), "recomputes the MLPs"
    if setting.ranks > 1:
        for stage in range(section.stage + 1, 4):
            yield (f"deepspeed.stage={stage}",), "communication" if stage < 3 else "weights are gathered in every pass"
    sharded = () if section.stage == 3 else ("deepspeed.stage=3",)
    if setting.ranks > 1 and recipe.eval.measures_at_start:
        yield (*sharded, AT_ONCE), "no evaluation before training to compare with"
    if not train.offload_activations:
        yield ("train.offload_activations=true",), "copies to host memory, overlapping with computation"
    size = recipe.sequence.parallel * 2
    while setting.ranks % size == 0 and size <= min(setting.ranks, shape.kv_heads):
        yield (f"sequence.parallel={size}",), "fewer rows at once, and all-to-all communication in every layer"
        size *= 2
    if (section.stage > 0 or setting.ranks > 1) and section.offload_optimizer == "none":
        yield ("deepspeed.offload_optimizer=cpu",), "the update runs on the host"
    if section.offload_parameters == "none":
        offload = (*sharded, "deepspeed.offload_parameters=cpu")
        yield offload, "weights are copied from host memory in every pass"
        if recipe.eval.measures_at_start:
            yield (*offload, AT_ONCE), "the same, and no evaluation before training to compare with"
    if setting.ranks == 1 and section.stage > 0:
        yield ("deepspeed.stage=0",), "nothing: with one GPU there is nothing to shard"
    if recipe.lora is None and train.parameters == "all" and recipe.model.path is not None:
        yield ("lora.rank=16",), "trains adapters instead of the weights; use ten times the learning rate"
    length = recipe.sequence.length
    while length // 2 >= SHORTEST:
        length //= 2
        yield (f"sequence.length={length}",), "shorter contexts"


def _flat(taken: list[tuple[str, ...]]) -> list[str]:
    return [override for overrides in taken for override in overrides]


def _sparing(overrides: list[str], fits: Callable[[list[str]], bool]) -> list[str]:
    """Without those that can be spared: what came early by what came late, so the dearest are tried first, and all of
    the rest again, as one may only have been held by another."""
    for index in reversed(range(len(overrides))):
        rest = overrides[:index] + overrides[index + 1 :]
        if fits(rest):
            return _sparing(rest, fits)
    return overrides
