"""A cache whose room is made once: for a horizon, with the pages that are still read, ready for ``torch.compile``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from sparsetrain.errors import ModelError
from sparsetrain.generation.memories import make_memory
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
        max_pages: pages of a row and layer at most; more are refused. None means as many as are needed.

    Raises:
        ModelError: the model has no attention method, or layers whose past is not keys and values of their own.
    """

    def __init__(self, model: nn.Module, *, max_length: int, rollback: int = 0, max_pages: int | None = None) -> None:
        for name, number, least in (
            ("max_length", max_length, 1),
            ("rollback", rollback, 0),
            ("max_pages", max_pages, 1),
        ):
            if number is not None and number < least:
                raise ModelError(f"{name}={number} must be at least {least}")
        modules: list[Any] = [module for module in model.modules() if hasattr(module, PLAN_ATTRIBUTE)]
        if not modules:
            raise ModelError(
                f"{type(model).__name__} has no attention method; call sparsetrain.sparsify(model, ...) first"
            )
        modules.sort(key=lambda module: module.layer_idx)
        layers = modules[0].config.num_hidden_layers
        if [module.layer_idx for module in modules] != list(range(layers)) or any(map(shares_keys, modules)):
            raise ModelError(
                f"{type(model).__name__} has layers whose past is not keys and values of their own (state spaces, "
                "convolutions, shared keys), which a SparseCache does not hold; generate without it"
            )
        super().__init__(
            layers=[
                StaticMemoryLayer(
                    make_memory(
                        module.sparsetrain_plan.method,
                        module.sparsetrain_plan.window,
                        max_length=max_length,
                        rollback=rollback,
                        max_pages=max_pages,
                        decode=module.sparsetrain_plan.decode,
                        index=module.sparsetrain_plan.index,
                    ),
                    module.sparsetrain_plan,
                    max_length,
                    next(module.parameters()).device,
                )
                for module in modules
            ]
        )
        self.max_length = max_length

    def nbytes(self) -> int:
        """Bytes of the tensors that its layers hold."""
        return sum(layer.memory.nbytes() for layer in self.layers)  # type: ignore[union-attr]
