"""Selective checkpointing: outputs of chosen operations are saved and reused in the recomputation.

``torch.utils.checkpoint.create_selective_checkpoint_contexts`` does the same, but requires that the recomputation runs
every operation as often as the forward pass did. This fails under ZeRO-3, where the gather operations of a layer depend
on the weights that are still present from the previous one. Here only the kept operations are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Keeps = Callable[[str], bool]
"""A predicate on an operation's name (``namespace::name``): whether its outputs are kept."""


def keeping_contexts(keeps: Keeps) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a checkpoint's forward pass and recomputation; with ``keeps`` bound, a ``context_fn``."""
    outputs: deque[tuple[Any, Any]] = deque()
    return _Keep(keeps, outputs), _HandBack(keeps, outputs)


class _Keep(TorchDispatchMode):
    def __init__(self, keeps: Keeps, outputs: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.keeps, self.outputs = keeps, outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.keeps(func._schema.name):
            # Detached, because autograd attaches the graph of the forward pass to the tensors themselves.
            self.outputs.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, output)))
        return output


class _HandBack(TorchDispatchMode):
    def __init__(self, keeps: Keeps, outputs: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.keeps, self.outputs = keeps, outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keeps(func._schema.name):
            return func(*args, **(kwargs or {}))
        kept, output = self.outputs.popleft() if self.outputs else (None, None)
        if kept is not func:
            raise RuntimeError(
                f"a checkpointed layer recomputes {func}, but its forward pass called {kept or 'nothing more'}"
            )
        return output
