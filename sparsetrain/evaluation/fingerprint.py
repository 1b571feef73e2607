"""What the numbers of an evaluation depend on beside tasks: whether finished samples are of the same model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetrain.evaluation.journal import digest
from sparsetrain.generation.texts import end_tokens
from sparsetrain.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.world import World

_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PIECE = 1 << 22
"""Elements summed at a time: their places, of 8 bytes each, are made beside them."""

_NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "sparsetrain", "transformers_version", "use_cache")
"""Fields of a config that no number depends on, or that are described beside it."""


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: str) -> dict[str, Any]:
    """What a model is evaluated as, for :meth:`~sparsetrain.evaluation.journal.Journal.open`.

    Args:
        model: gone through :func:`sparsetrain.sparsify`.
        tokenizer: whose EOS may end a text.
        weights: their :func:`weights_digest`.
    """
    record: dict[str, Any] = model.config.sparsetrain
    return {
        "attention": record["attention"],
        "decode": record.get("decode"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "sparsetrain": __version__,
        "weights": weights,
        "config": _config_digest(model),
        "end_tokens": sorted(end_tokens(model, tokenizer)),
    }


def _config_digest(model: PreTrainedModel) -> str:
    """A digest of what the same weights are computed with: an activation, an epsilon, a scale of positions."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    return digest({name: value for name, value in sorted(fields.items()) if name not in _NOT_COMPUTED})


def weights_digest(model: nn.Module, world: World) -> str:
    """A digest of parameters and buffers: of their names, and of the sum of their bits, as integers, times their
    places, so that an order of the same values counts too.

    Weights that ZeRO-3 has spread over ranks are summed over all, which is then a collective operation: the number of
    ranks makes no difference.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    shards = [getattr(tensor, "ds_tensor", None) for _, tensor in named]
    sums = [
        _sum(tensor if shard is None else shard, world.rank * (shard is not None), getattr(tensor, "ds_numel", None))
        for (_, tensor), shard in zip(named, shards, strict=True)
    ]
    totals = torch.stack([each.to(world.device) for each in sums])
    if world.size > 1 and any(shard is not None for shard in shards):
        whole = torch.tensor([shard is None for shard in shards], device=world.device)
        shared = totals.where(~whole, 0)
        torch.distributed.all_reduce(shared)
        totals = totals.where(whole, shared)
    return digest([[name for name, _ in named], totals])


def _sum(tensor: Tensor, part: int, end: int | None) -> Tensor:
    """The sum of (place + 1) x bits, modulo 2^64.

    Args:
        part: which of the equal parts of the whole one the tensor is.
        end: how many elements the whole one has; what a part holds behind them is padding. None where it is whole.
    """
    kind = _AS_INTEGERS[tensor.element_size()]
    if tensor.is_complex():
        tensor, kind = torch.view_as_real(tensor), _AS_INTEGERS[tensor.element_size() // 2]
    bits = tensor.detach().contiguous().view(kind).flatten()
    first = part * len(bits)
    if end is not None:
        bits = bits[: max(end - first, 0)]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(_PIECE):
        total += (torch.arange(first + 1, first + 1 + len(piece), device=bits.device) * piece).sum()
        first += len(piece)
    return total
