"""Finds Twilight's p for each layer (2502.02770, section 3) from what its output may lose, on held-out text.

The softmax over kept keys is made anew, so that ``o = m * o_kept + (1 - m) * o_rest`` for a true weight ``m`` of the
kept keys, and the error is ``(1 - m) * |o_rest - o_kept|``: it depends on the values, which no p knows. So it is
measured: one dense pass over each text, and in each layer sampled rows as if each were a step of generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsetrain.counted import counted
from sparsetrain.errors import ModelError
from sparsetrain.generation.candidates import GRANULE
from sparsetrain.generation.listed import ListedMemory
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.probe import ChannelWeights, Loss, Probe, join
from sparsetrain.generation.settings import Calibrated, Decode
from sparsetrain.modeling import set_decode
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.cache import MemoryLayer
from sparsetrain.modeling.layers import sparse_layers
from sparsetrain.modeling.records import identity

SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
"""The p that are tried."""
USUAL_ROWS = 64

Measuring = TypeVar("Measuring", bound=ListedMemory)


@dataclass(frozen=True)
class Layer:
    """What one layer loses with the p that was chosen for it."""

    index: int
    p: float | None
    """None where even p = 1 loses too much, because the selector passes on too little or a list has no room for all:
    the layer goes on to read all keys."""
    error: float
    """Norm of the output's error over the norm of the output: the mean over rows and query heads. With the largest p
    where none was chosen, like all that follows."""
    worst: float
    """The largest of a row and head."""
    kept: float
    """Keys that a KV head reads in the mean."""
    keys: float
    """Keys that there are in the mean."""
    mass: float
    """True softmax weight of the keys that are read, in the mean."""
    candidate_mass: float
    """True softmax weight of the keys that the selector passes on, in the mean; 1 where those are all."""


def places(texts: int, tokens: int, rows: int | None, seed: int) -> list[Tensor]:
    """The rows that are measured in each text, int64 ``[rows]``, ascending: ends of pages of 16 tokens in its second
    half.

    Args:
        texts: their number; rows are spread evenly.
        tokens: of each.
        rows: of all together; None means 64, or as many as there are.

    Raises:
        ModelError: there are not so many.
    """
    ends = torch.arange(GRANULE - 1, tokens, GRANULE)
    ends = ends[ends >= tokens // 2]
    if rows is None:
        rows = min(USUAL_ROWS, texts * len(ends))
    if rows > texts * len(ends):
        raise ModelError(
            f"--rows {rows}: {counted(texts, 'text')} of {tokens:,} tokens have {texts * len(ends)} rows to measure, "
            f"one for every {GRANULE} tokens of their second halves; lower it, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    counts = [rows // texts + (text < rows % texts) for text in range(texts)]
    return [ends[torch.randperm(len(ends), generator=generator)[:count]].sort().values for count in counts]


def sample(decode: Decode, texts: int, tokens: int, rows: int | None, seed: int) -> list[Tensor]:
    """The rows that are measured with a section, int64 ``[rows]`` of each text, as :func:`places` draws them.

    Raises:
        ModelError: the section cannot be measured, or not on so little text.
    """
    if decode.refresh is not None:
        raise ModelError(
            "decode.refresh is not measured: calibrate without it, and add it to the section that comes out"
        )
    if decode.select == "own":
        raise ModelError(
            "decode.select=own is not measured: a pattern has given up keys that rows in the middle of a text would "
            "need; set prune.p yourself"
        )
    if decode.prune is None:
        raise ModelError("decode.prune is missing: calibrate finds its p")
    anyway = decode.sinks + decode.recent + decode.prune.min_keys
    if anyway >= tokens // 2:
        raise ModelError(
            f"--tokens {tokens}: rows from token {tokens // 2} on are measured, and sinks, recent and prune.min_keys "
            f"read {anyway} keys with any p; raise it above {2 * anyway}, or lower those"
        )
    return places(texts, tokens, rows, seed)


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    error: float,
    rows: int | None = None,
    seed: int = 0,
    name: str = "the model",
    data: str = "texts",
    on_text: Callable[[], None] = lambda: None,
) -> tuple[Decode, list[Layer]]:
    """The section with a p for each layer, and what each loses. The model is left with all keys read.

    Args:
        model: sparsified, on its device.
        texts: token ids, all of one length.
        decode: what is read beside; its p is replaced.
        error: what the output of a layer may lose in the mean, relative to its norm: the smallest p of
            :data:`SHARES` is taken that loses no more.
        rows: that are measured in each layer, spread over the texts; None means 64, or as many as there are.
        seed: of the choice of rows.
        name, data: of model and texts, for the record.
        on_text: called after each text.

    Raises:
        ModelError: the section does not fit the model, there is too little text, or no layer can read fewer keys.
    """
    tokens = len(texts[0])
    sampled = sample(decode, len(texts), tokens, rows, seed)
    prune = decode.prune
    assert prune is not None
    unpruned = decode.model_copy(update={"prune": prune.model_copy(update={"p": 1.0}), "calibrated": None})
    if decode.select == "channels":
        unpruned = unpruned.model_copy(update={"heavy_channels": _heavy_channels(model, texts, unpruned)})
    losses = _losses(model, unpruned, zip(texts, sampled, strict=True), on_text)
    layers = [_choose(index, join(parts), error) for index, parts in sorted(losses.items())]
    chosen = {layer.index: layer.p for layer in layers if layer.p is not None}
    if not chosen:
        raise _out_of_reach(layers, decode, error)
    record = Calibrated(
        name=name,
        model=identity(model.config),
        error=error,
        data=data,
        tokens=tokens,
        rows=sum(map(len, sampled)),
    )
    dense = sorted({*decode.dense_layers, *(layer.index for layer in layers if layer.p is None)})
    found = {"prune": prune.model_copy(update={"p": chosen}), "dense_layers": dense, "calibrated": record}
    if unpruned.heavy_channels is not None:
        found["heavy_channels"] = {index: unpruned.heavy_channels[index] for index in chosen}
    return decode.model_copy(update=found), layers


def _losses(
    model: PreTrainedModel,
    decode: Decode,
    texts: Iterable[tuple[Sequence[int], Tensor]],
    on_text: Callable[[], None],
) -> dict[int, list[Loss]]:
    """What each layer that takes the section loses, text by text, in rows ``[rows]`` of each."""
    set_decode(model, decode)
    found: dict[int, list[Loss]] = {}
    try:
        for text, at in texts:
            losses = _measure(model, text, at) if len(at) else {}
            for index, loss in losses.items():
                found.setdefault(index, []).append(loss)
            on_text()
    finally:
        set_decode(model, None)
    return found


def _out_of_reach(layers: Sequence[Layer], decode: Decode, error: float) -> ModelError:
    """That every layer loses more than ``error``, and the way out."""
    best = min(layers, key=lambda layer: layer.error)
    remedy = "--decode.candidates" if decode.select != "full" else "lower --tokens, because a list has no room for more"
    return ModelError(
        f"--error {error:g} is out of reach in all layers: with p=1 layer {best.index} still loses "
        f"{best.error:.3g}, because it reads {best.kept:,.0f} of {best.keys:,.0f} keys, with {best.mass:.1%} of "
        f"the softmax weight; raise --error or {remedy}"
    )


def _heavy_channels(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], decode: Decode
) -> dict[int, list[list[int]]]:
    """The heaviest channels of each layer and KV head over all texts (Double Sparsity, 2408.07092, section 3)."""
    set_decode(model, decode.model_copy(update={"heavy_channels": None}))
    weights: dict[int, Tensor] = {}
    try:
        for text in texts:
            for index, memory in _pass(model, text, ChannelWeights).items():
                assert memory.weights is not None
                weights[index] = weights.get(index, 0) + memory.weights
    finally:
        set_decode(model, None)
    width = next(iter(weights.values())).shape[1]
    if decode.channels > width:
        raise ModelError(f"--decode.channels {decode.channels}: keys of this model have {width}; lower it")
    return {index: weight.topk(decode.channels).indices.sort().values.tolist() for index, weight in weights.items()}


def _measure(model: PreTrainedModel, text: Sequence[int], at: Tensor) -> dict[int, Loss]:
    """What each layer that takes the section loses in some rows of a text, by one dense pass."""
    probes = _pass(model, text, partial(Probe, at=at, shares=SHARES))
    return {index: probe.loss for index, probe in probes.items() if probe.loss is not None}


@torch.no_grad()
def _pass(model: PreTrainedModel, text: Sequence[int], make: Callable[..., Measuring]) -> dict[int, Measuring]:
    """The memories of the layers that take the section, after one dense pass over a text."""
    cache = DynamicCache(config=model.config)
    memories: dict[int, Measuring] = {}
    for index, module, _ in sparse_layers(model):
        plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE)
        if plan.decode is None:
            continue
        made: Any = make_memory(plan.method, plan.window, decode=plan.decode, index=index, listed=make)
        memories[index] = made
        place: Any = module.layer_idx
        cache.layers[place] = MemoryLayer(made, plan)
    decoder: Any = model.get_decoder()
    try:
        decoder(input_ids=torch.tensor([list(text)], device=model.device), past_key_values=cache, use_cache=True)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model.device} has too little memory for a text of {len(text):,} tokens; lower --tokens"
        ) from error
    return memories


def _choose(index: int, loss: Loss, target: float) -> Layer:
    errors = loss.error.mean(dim=(1, 2))
    fits = [place for place, error in enumerate(errors.tolist()) if error <= target]
    at = fits[0] if fits else len(SHARES) - 1
    return Layer(
        index,
        SHARES[at] if fits else None,
        float(errors[at]),
        float(loss.error[at].max()),
        float(loss.kept[at].mean()),
        float(loss.keys.mean()),
        float(loss.mass[at].mean()),
        float(loss.candidate_mass.mean()),
    )
