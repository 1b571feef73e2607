"""A step of generation that is the same for every token: one CUDA graph, replayed.

The arguments of the model are tensors that stay where they are. Tokens are written into them, positions move on in the
graph, and everything else is in the tensors of a :class:`~sparsetrain.SparseCache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.generation.observed import is_observing, observing
from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.modeling import SparseCache
from sparsetrain.modeling.attention.mask import REQUEST_ATTRIBUTE

TOKENS = "input_ids"
PLACES = ("position_ids", "cache_position")
"""Arguments that grow by 1 with every step."""
WATCHED = 61
"""Steps between two that count what they read. A prime, so that they fall everywhere between two choices of keys that
are made every few steps."""


class CapturedStep:
    """The step of one model, cache and batch. On a CPU it is run as it is.

    Args:
        model: a causal language model.
        cache: a cache that holds the prompts.
        inputs: what ``model`` takes in the next step, as its ``prepare_inputs_for_generation`` makes it.
    """

    def __init__(self, model: Any, cache: SparseCache, inputs: Mapping[str, Any]) -> None:
        self._model, self._cache = model, cache
        self._inputs = {
            name: value.clone() if name in (TOKENS, *PLACES) and isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By whether the step counts what it reads, and measures its weight."""
        self._fixed: tuple[Any, ...] = ()
        self._replayed = self._step = 0
        self._offloaded = [each.memory for each in cache.layers if isinstance(each.memory, OffloadedMemory)]  # type: ignore[union-attr]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: its graph reads this cache, and a copy of the cache captures a step of its own."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's arguments."""
        return self._inputs

    def run_plainly(self) -> Any:
        """Run the step without a graph, which also compiles its kernels. Returns the model's output."""
        self._step += 1
        out = self._model(**self._inputs, return_dict=True)
        self._advance()
        return out

    def goes_on(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the arguments of the next step are those that this one has moved on to, but for the token. Waits for
        the device."""
        return _alike(self._inputs, inputs, apart=(TOKENS,))

    def capture(self) -> None:
        """Make the graph, and where layers choose what they read and are observed, one that counts it too. Whatever
        fails in the model while it is captured is raised, and the cache stays as it is."""
        if self._inputs[TOKENS].is_cuda:
            self._record(watched=False)
            # Now, not when it is used first: a capture takes as long as many steps.
            if is_observing() and self._chooses():
                self._record(watched=True)
        self._fixed = self._now_fixed()

    def start_again(self, inputs: Mapping[str, Any]) -> bool:
        """Take the arguments of a step of another batch, if the graph is right for it. Waits for the device."""
        if self._fixed != self._now_fixed() or not _alike(self._inputs, inputs, apart=(TOKENS, *PLACES)):
            return False
        for name in PLACES:
            if isinstance(inputs.get(name), Tensor):
                self._inputs[name].copy_(inputs[name])
        self._step = 0
        return True

    def take(self, tokens: Tensor) -> None:
        """Take the token of each row that the next step reads, int64 ``[B]``."""
        self._inputs[TOKENS].copy_(tokens[:, None], non_blocking=True)

    def run(self) -> Tensor:
        """Run the step.

        Returns:
            The logits of the next tokens, ``[B, vocabulary]``, in a tensor that the next step overwrites.
        """
        if not self._graphs:
            out: Tensor = self.run_plainly().logits[:, -1]
            return out
        graph, logits = self._graphs[self._step % WATCHED == 0 and True in self._graphs]
        if self._offloaded:
            self._cache.prepare(1)
        graph.replay()
        for memory in self._offloaded:
            memory.has_run()
        self._replayed += 1
        self._step += 1
        return logits

    def finish(self) -> None:
        """Tell the cache's layers what the graphs have read: nothing of them ran on the host."""
        self._cache.set_host_counts(self._cache.host_counts(), self._replayed)
        self._replayed = 0

    def _record(self, *, watched: bool) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next((made.pool() for made, _ in self._graphs.values()), None)
        self._cache.prepare(1)
        device = self._inputs[TOKENS].device
        counts, generator = self._cache.host_counts(), _generator(device)
        drawn = generator.get_state()
        for memory in self._offloaded:
            memory.prepared_between = True
        try:
            with (
                observing(1 if watched else 0),
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"),
            ):
                logits = self._model(**self._inputs, return_dict=True).logits[:, -1]
                self._advance()
        except BaseException:
            # A capture that was broken off leaves the generator's state in it, where nothing can be drawn.
            fresh = torch.Generator(generator.device)
            fresh.set_state(drawn)
            generator.graphsafe_set_state(fresh)
            raise
        finally:
            self._cache.set_host_counts(counts)
            for memory in self._offloaded:
                memory.prepared_between = False
        self._graphs[watched] = graph, logits

    def _advance(self) -> None:
        for name in PLACES:
            if isinstance(self._inputs.get(name), Tensor):
                self._inputs[name].add_(1)

    def _chooses(self) -> bool:
        return any(layer.memory.chooses for layer in self._cache.layers)  # type: ignore[union-attr]

    def _now_fixed(self) -> tuple[Any, ...]:
        """What must be as it was for the graph to be right."""
        memories = [layer.memory.fixed() for layer in self._cache.layers]  # type: ignore[union-attr]
        weights = [each.data_ptr() for each in (*self._model.parameters(), *self._model.buffers())]
        return self._model.training, is_observing(), *_code(self._model), *memories, *weights


def _code(model: Any) -> Iterator[Any]:
    """What runs in a pass: modules, functions that stand for their ``forward``, hooks, and which adapters take part,
    and how strongly, which peft decides on the host, with the same weights."""
    for module in model.modules():
        yield module
        yield module.__dict__.get("forward")
        # Of each a number of its own, which no later one gets.
        yield *module._forward_pre_hooks, *module._forward_hooks
        if isinstance(getattr(module, "lora_A", None), Mapping | nn.Module):
            yield f"{module.active_adapters} {module.disable_adapters} {module.scaling}"


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which all graphs of a device are captured: cuBLAS keeps memory of its own for each stream."""
    return torch.cuda.Stream(device)


def _generator(device: torch.device) -> torch.Generator:
    """That by which tokens are drawn on a CUDA device."""
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _alike(held: Mapping[str, Any], given: Mapping[str, Any], *, apart: tuple[str, ...]) -> bool:
    """Whether the arguments of two steps are the same; of those that are set ``apart``, only their shapes."""
    ours, theirs = dict(_leaves(held)), dict(_leaves(given))
    if ours.keys() != theirs.keys():
        return False
    for name, mine in ours.items():
        other = theirs[name]
        if not isinstance(mine, Tensor) or not isinstance(other, Tensor):
            if mine is not other and (isinstance(mine, Tensor) or isinstance(other, Tensor) or mine != other):
                return False
            continue
        if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
            return False
        if getattr(mine, REQUEST_ATTRIBUTE, None) != getattr(other, REQUEST_ATTRIBUTE, None):
            return False
        if name not in apart and not torch.equal(mine, other):
            return False
    return True


def _leaves(inputs: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Arguments by name; those of a mapping, such as masks by the kind of layer, one by one."""
    for name, value in inputs.items():
        if type(value) is dict:
            yield from _leaves(value, f"{place}{name}.")
        else:
            yield place + name, value
