"""A training pass over a row that ranks share: what each makes and sends, and its gradient beside one rank's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from sparsetrain import sparsify
from sparsetrain.data import collate
from sparsetrain.data.batch import IGNORE, Batch, Row
from sparsetrain.data.sequence_part import collate_part
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.passes import planned_arguments
from sparsetrain.modeling.ulysses import Ulysses
from sparsetrain.training.distributed.engine import init_world
from sparsetrain.training.loss import CausalLMLoss, pass_tensors
from sparsetrain.training.memory.activation_checkpointing import enable_activation_checkpointing

TOKENS, WIDTH = 512, 128
METHODS = {
    "power": {"method": "power", "block": 16, "window": 2, "sinks": 1, "dense_layers": [0]},
    "sparsek": {"method": "sparsek", "topk": 16, "window": 16, "sinks": 2},
    "recycled": {"method": "recycled", "every": [64], "keep": 16, "sinks": 1, "recent": 4, "text_prefix": "none"},
}


class Largest(TorchDispatchMode):
    """The most bytes of a storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [each.untyped_storage().nbytes() for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
        self.nbytes = max(self.nbytes, *made, 0)
        return output


def count(file: Path) -> None:
    """Write the counts of each method, of two ranks that share a row and of one with half of it."""
    ulysses = Ulysses(dist.group.WORLD) if init_world().size == 2 else None
    found = {}
    for name, method in METHODS.items():
        found[name] = {"shared": _counts(method, 2 * TOKENS, ulysses), "alone": _counts(method, TOKENS, None)}
    file.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))


def compare(file: Path) -> None:
    """Write, for each method with a dense layer beside it, how the gradient of the ranks that share a row differs from
    that of one, relatively, and the bytes that a rank sends."""
    ulysses = Ulysses(dist.group.WORLD) if init_world().size > 1 else None
    found = {}
    for name, method in METHODS.items():
        both = []
        for group in (None, ulysses):
            model, loss, arguments, _ = _pass({**method, "dense_layers": [0]}, 250, group, kv_heads=4)
            with _sent() as sent:
                value = loss(**arguments)
                value.backward()
            gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
            both.append(torch.cat([value.detach()[None], gradient]))
        dist.all_reduce(both[1])
        (loss_alone, alone), (loss_shared, shared) = ((each[0], each[1:]) for each in both)
        found[name] = {
            "loss": float((loss_shared - loss_alone).abs() / loss_alone),
            "gradient": float((shared - alone).norm() / alone.norm()),
            "sent": sent,
        }
    file.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(found))


@contextmanager
def _sent() -> Iterator[list[int]]:
    """The bytes of every all-to-all."""
    found: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output: torch.Tensor, given: torch.Tensor, *rest: Any, **more: Any) -> Any:
        found.append(given.nbytes)
        return exchange(output, given, *rest, **more)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield found


def _counts(method: dict[str, Any], tokens: int, ulysses: Ulysses | None) -> dict[str, int]:
    model, loss, arguments, batch = _pass(method, tokens, ulysses)
    enable_activation_checkpointing(model, "selective")
    with Largest() as largest:
        loss(**arguments).backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(**arguments).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    data = max(each.untyped_storage().nbytes() for each in vars(batch).values() if isinstance(each, torch.Tensor))
    return {"largest": largest.nbytes, "peak": peak, "data": data}


def _pass(
    method: dict[str, Any], tokens: int, ulysses: Ulysses | None, *, kv_heads: int = 2
) -> tuple[Any, CausalLMLoss, dict[str, Any], Batch]:
    """A model, its loss, and the arguments for a row of two documents, with their batch."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **size, num_attention_heads=8, num_key_value_heads=kv_heads)
    config.max_position_embeddings = 2 * TOKENS
    model = sparsify(AutoModelForCausalLM.from_config(config, dtype=torch.float32), method).train()
    loss = CausalLMLoss(model, 128, ulysses=ulysses)
    ids = torch.randint(32, (tokens,)).numpy()
    labels = ids.copy()
    cut = 3 * tokens // 5
    labels[[0, cut]] = IGNORE
    rows = [Row(ids, labels, [cut, tokens - cut], ["a", "b"])]
    batch = collate(rows) if ulysses is None else collate_part(rows, ulysses.rank, ulysses.size)
    arguments = {
        **pass_tensors(batch),
        "num_chunks": 8,
        "planned": planned_arguments({id(m): m for _, _, m in sparse_layers(model) if m}.values(), batch, seed=0),
    }
    return model, loss, arguments, batch
