"""Ways to generate with one model: transformers' caches and full attention, and ours with each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from sparsetrain.bench.contenders.stand_ins import use_no_attention
from sparsetrain.generation.candidates import GRANULE
from sparsetrain.generation.pages import PagedMemory
from sparsetrain.generation.settings import parse_decode
from sparsetrain.modeling import SparseCache, set_decode, sparsify

SHARP = 4.2
"""The weights of the norm of queries. Logits of random keys then have this deviation instead of 1, so that few keys
hold most of the weight, as in trained models; with 1, top-p would read nearly all."""
PERIOD = 7
"""Layers among which ``Way.dense`` of them are dense."""
AGAIN: dict[str, Any] = {"prune": {"p": 0.95}, "refresh": {"every": 8}}
"""Twilight's top-p over all keys, every 8th step."""
RECYCLED: dict[str, Any] = {"every": 32, "keep": 2048}
"""As the recipes for 131,072 tokens train it; every layer chooses."""


@dataclass(frozen=True)
class Way:
    """A way to generate."""

    name: str
    title: str
    method: str | None = None
    """The attention method; None for transformers' own attention and cache."""
    decode: str | Mapping[str, Any] | None = None
    """What a step reads, as for :func:`~sparsetrain.set_decode`."""
    dense: int = 0
    """Layers of every ``PERIOD`` that keep full attention."""
    attention: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the attention section beside the method."""

    def model(self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """A model with random weights."""
        torch.manual_seed(0)
        with device:
            made: Any = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa"
            )
            for layer in made.model.layers:
                layer.self_attn.q_norm.weight.data.fill_(SHARP)
            if self.method is not None:
                dense = [index for index in range(config["num_hidden_layers"]) if index % PERIOD < self.dense]
                made = sparsify(made, {"method": self.method, "dense_layers": dense, **self.attention})
        return set_decode(made, self.decode).eval() if self.decode is not None else made.eval()

    def cache(self, model: PreTrainedModel, max_length: int) -> Cache:
        """An empty cache for texts of ``max_length`` tokens."""
        if self.method is not None:
            return SparseCache(model, max_length=max_length)
        return StaticCache(model.config, max_length) if self.name == "static" else DynamicCache(config=model.config)

    def bytes_of_a_key(self, head_dim: int, itemsize: int) -> float:
        """Bytes that stay of every token and KV head in the mean of the layers; those of a method that keeps few tokens
        count as 0."""
        share = 1 if self.method in (None, "full", "recycled") else self.dense / PERIOD
        size: float = 2 * head_dim * itemsize
        decode = None if self.decode is None else parse_decode(self.decode)
        if decode is not None and decode.prune is not None:
            size += head_dim // 2 + 4
        if decode is not None and decode.select == "quest":
            size += 2 * head_dim * itemsize / GRANULE
        if decode is not None and decode.select == "channels":
            size += decode.channels // 2 + 4
        return share * size

    def read_prompt(self, model: PreTrainedModel, cache: Cache, ids: Tensor) -> Tensor:
        """A pass of the prompts ``[batch, tokens]``; the next tokens ``[batch, 1]``."""
        out: Any = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(-1)

    def fill(self, model: Any, cache: Cache, ids: Tensor) -> Tensor:
        """The keys and values of random hidden states, without attention and MLPs. Returns tokens ``[batch, 1]``."""
        hidden = torch.randn(*ids.shape, model.config.hidden_size, dtype=model.dtype, device=ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        common = {"attention_mask": None, "position_ids": positions, "past_key_values": cache}
        rotary = model.model.rotary_emb(hidden, positions)
        if self.method is None:
            use_no_attention(model)
        for index, layer in enumerate(model.model.layers):
            memory = getattr(cache.layers[index], "memory", None) if self.method is not None else None
            with _without_attention(memory):
                layer.self_attn(hidden_states=hidden, position_embeddings=rotary, **common)
        if self.method is None:
            model.set_attn_implementation("sdpa")
        return ids[:, -1:].clone()


@contextmanager
def without_attention(cache: SparseCache) -> Iterator[None]:
    """Steps hand their queries on within it, and leave the cache as it is."""
    memories: list[Any] = [layer.memory for layer in cache.layers]  # type: ignore[union-attr]
    for memory in memories:
        memory.attend = lambda layer, query, key, value, **options: query
    try:
        yield
    finally:
        for memory in memories:
            del memory.attend


@contextmanager
def _without_attention(memory: Any) -> Iterator[None]:
    """Prompts only fill pages within it; SparseK's need no stand-in: its prompts are cheap."""
    if not isinstance(memory, PagedMemory):
        yield
        return
    attend, memory._attend = memory._attend, lambda layer, query, key, value, **options: query
    try:
        yield
    finally:
        memory._attend = attend


WAYS = (
    Way("dynamic", "transformers, DynamicCache"),
    Way("static", "transformers, StaticCache"),
    Way("full", "sparsetrain, full", "full"),
    Way("power", "sparsetrain, PowerAttention", "power"),
    Way("sliding", "sparsetrain, sliding", "sliding"),
    Way("sparsek", "sparsetrain, SparseK", "sparsek"),
    Way("twilight", "sparsetrain, Twilight, all keys", "full", "twilight-full"),
    Way("twilight-quest", "sparsetrain, Twilight, Quest's pages", "full", "twilight"),
    Way("quest", "sparsetrain, Quest", "full", "quest"),
    Way(
        "twilight-own",
        "sparsetrain, Twilight, PowerAttention's keys",
        "power",
        {"select": "own", "prune": {"p": 0.95}, "dense_layers": []},
    ),
    Way("channels", "sparsetrain, Double Sparsity", "full", {"select": "channels"}),
    Way("refresh", "sparsetrain, Twilight, used again", "full", AGAIN),
    Way("recycled", "sparsetrain, recycled, 2,048 keys for 32 tokens", "recycled", attention=RECYCLED),
    Way("hybrid", "sparsetrain, PowerAttention, 2 dense layers in 7", "power", dense=2),
    Way(
        "hybrid-refresh",
        "sparsetrain, PowerAttention, Twilight in 2 of 7",
        "power",
        AGAIN | {"dense_layers": []},
        dense=2,
    ),
)
"""The ways by name."""
