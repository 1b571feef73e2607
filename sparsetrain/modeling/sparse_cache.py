"""A cache whose room is made once: for a horizon, with the pages that are still read, ready for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsetrain.errors import ModelError
from sparsetrain.generation.composition import attention_kind
from sparsetrain.generation.limits import Limits
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.generation.setting_text import parse_budget
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE
from sparsetrain.modeling.cache import StaticMemoryLayer, shares_keys


class SparseCache(Cache):
    """The past of one batch of texts of at most ``max_length`` tokens, for a sparsified model.

    Pass it as ``past_key_values``. The room is made with the first tokens, in ``generate`` the whole prompt: of each
    layer the pages that a token up to ``max_length`` still reads (:mod:`sparsetrain.generation.page_table`). Behind a
    prompt of 131,072 tokens, 1,024 more need 33 of PowerAttention's 516 pages. A step then has the same shapes and
    addresses for every length: ``generate`` compiles it on CUDA by itself, and CUDA graphs hold it.

    Args:
        model: the model; a later ``sparsify`` needs a new cache.
        max_length: tokens of a row at most: padding, prompt, generated ones, and where drafts are read their tokens on
            top.
        rollback: tokens that can be taken back in any case (assisted generation). Of layers that forget, each block of
            these is a page more.
        budget: tokens of a row that each layer may have room for on its device; a prompt that needs more is refused
            with the number. ``auto`` means as many as are needed. Layers with full attention keep all tokens.
        offload: layers with a block pattern keep all their keys in host memory, and on the device what is read now
            and next; any number of tokens can then be taken back. Other layers stay on the device.

    Raises:
        ModelError: the model has no attention method, or layers whose past is not keys and values of their own; an
            argument is out of range, or none of the layers allows it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int,
        rollback: int = 0,
        budget: int | str = "auto",
        offload: bool = False,
    ) -> None:
        for name, number, least in (("max_length", max_length, 1), ("rollback", rollback, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ModelError(f"{name}={number!r} must be a number of tokens of at least {least}")
        limits = Limits(parse_budget(budget), offload)
        modules = _attention_layers(model)
        plans = [module.sparsetrain_plan for module in modules]
        limits.check(attention_kind(plan.method, plan.window) for plan in plans)
        devices = [next(module.parameters()).device for module in modules]
        seen = {device: torch.zeros((), dtype=torch.int64, device=device) for device in devices}
        for count in seen.values():
            torch._dynamo.mark_static_address(count)
        # The last layer of a device counts: a crop asks every layer for the count before it changes.
        counting = dict(zip(devices, range(len(modules)), strict=True)).values()
        super().__init__(
            layers=[
                StaticMemoryLayer(
                    make_memory(
                        plan.method,
                        plan.window,
                        max_length=max_length,
                        rollback=rollback,
                        limits=limits,
                        decode=plan.decode,
                        index=plan.index,
                    ),
                    plan,
                    max_length,
                    seen[device],
                    counts=index in counting,
                )
                for index, (plan, device) in enumerate(zip(plans, devices, strict=True))
            ]
        )
        self.captured: Any = None
        """A captured step that :func:`sparsetrain.generate` keeps for the next batch."""
        self.max_length = max_length
        memories = [layer.memory for layer in self.layers]  # type: ignore[union-attr]
        for layer in self.layers:
            layer.told = tuple(memory for memory in memories if isinstance(memory, OffloadedMemory))  # type: ignore[union-attr]

    def prepare(self, tokens: int) -> None:
        """Bring from the host what the next pass reads, of so many tokens a row. ``generate``, and any pass that makes
        masks outside of what is compiled, does this by itself."""
        for layer in self.layers:
            layer.memory.prepare(tokens)  # type: ignore[union-attr]

    @contextmanager
    def reading(self, tokens: int) -> Iterator[None]:
        """Within it, calls read a text of so many tokens a row in parts (``prefill_chunk_size``): layers that choose
        their keys read every part as they would read the whole, however short it is."""
        for layer in self.layers:
            layer.memory.part_of = tokens  # type: ignore[union-attr]
        try:
            yield
        finally:
            for layer in self.layers:
                layer.memory.part_of = 0  # type: ignore[union-attr]

    def host_counts(self) -> list[tuple[int, int, int]]:
        """What the host has counted of each layer. A captured step counts only on the device."""
        return [layer.host_counts() for layer in self.layers]  # type: ignore[union-attr]

    def set_host_counts(self, counts: Sequence[tuple[int, int, int]], more: int = 0) -> None:
        """Take the counts of :meth:`host_counts`, and ``more`` tokens of every row."""
        for layer, each in zip(self.layers, counts, strict=True):
            layer.set_host_counts(each, more)  # type: ignore[union-attr]

    def check_prompts(self, lengths: Sequence[int]) -> None:
        """Refuse a batch of prompts whose layers need more than the budget, before anything is computed.

        Args:
            lengths: tokens of each prompt.

        Raises:
            ModelError: names the number that is needed.
        """
        for layer in self.layers:
            layer.memory.check_prompts(lengths)  # type: ignore[union-attr]

    def nbytes(self) -> int:
        """Bytes of the tensors that its layers hold on their devices."""
        return sum(layer.memory.nbytes() for layer in self.layers)  # type: ignore[union-attr]

    def host_nbytes(self) -> int:
        """Bytes that its layers hold in host memory (``offload``)."""
        return sum(layer.memory.host_nbytes() for layer in self.layers)  # type: ignore[union-attr]


def _attention_layers(model: nn.Module) -> list[Any]:
    """The attention layers of a sparsified model, in order.

    Raises:
        ModelError: there is none, or what they remember is not keys and values of their own.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, PLAN_ATTRIBUTE)]
    if not modules:
        raise ModelError(f"{type(model).__name__} has no attention method; call sparsetrain.sparsify(model, ...) first")
    modules.sort(key=lambda module: module.layer_idx)
    config = modules[0].config
    every = [module.layer_idx for module in modules] == list(range(config.num_hidden_layers))
    # What transformers keeps of each layer: some have a state beside their keys (Falcon-H1).
    kept = DynamicCache(config=config).layers
    own = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept)
    if not every or not own or any(map(shares_keys, modules)):
        raise ModelError(
            f"{type(model).__name__} has layers whose past is not keys and values of their own (state spaces, "
            "convolutions, shared keys), which a SparseCache does not hold; generate without it"
        )
    return modules
