"""What every attention method shares: its recipe section, and the object a layer calls instead of dense attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Unpack

from pydantic import Field, PositiveInt, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.section import Section

if TYPE_CHECKING:
    import torch
    from sparsetrain_kernels.inputs import AttentionOptions
    from torch import nn

    from sparsetrain.patterns import Pattern


class DenseLayerRule(Section):
    """``count`` dense layers in every ``every`` layers; the paper's RULER models use 2 in every 7 (2503.03588, 4.4)."""

    count: PositiveInt
    """Dense layers in each group."""
    every: PositiveInt
    """Layers in a group."""
    first: Annotated[int, Field(ge=0)] = 0
    """Position of the first dense layer within its group; the dense layers of a group are neighbours."""

    @model_validator(mode="after")
    def _within_the_group(self) -> DenseLayerRule:
        if self.first + self.count > self.every:
            raise ValueError(
                f"first={self.first} and count={self.count} reach beyond the group of every={self.every} layers; "
                "lower them or raise every"
            )
        return self

    def layers(self, num_layers: int) -> set[int]:
        """The dense layers of a model with ``num_layers`` layers."""
        return {i for i in range(num_layers) if self.first <= i % self.every < self.first + self.count}


class MethodConfig(Section, ABC):
    """The ``attention`` section of a recipe: which method, its parameters, and which layers stay dense."""

    new_modules: ClassVar[tuple[str, ...]] = ()
    """Attribute names of the submodules :meth:`Method.attach` adds to an attention layer, which a run can train alone
    or at a learning rate of their own, and which an adapter carries with it."""

    method: str
    dense_layers: list[int] | DenseLayerRule = []
    """Layers that stay as the model made them, which is full attention in most: a list of layer indices (negative ones
    count from the last layer) or a rule such as ``{count: 2, every: 7}``."""
    replace_sliding_layers: bool = False
    """In hybrid models (Gemma-3, gpt-oss), also replace the layers that already use a sliding window. By default they
    keep it and only the global layers take the method."""

    def resolve_dense_layers(self, num_layers: int) -> set[int]:
        """The dense layers as indices.

        Raises:
            ModelError: a listed layer does not exist.
        """
        if isinstance(self.dense_layers, DenseLayerRule):
            return self.dense_layers.layers(num_layers)
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise ModelError(
                    f"attention.dense_layers names layer {layer}, but the model has {num_layers} layers "
                    f"(0 to {num_layers - 1})"
                )
        return {layer % num_layers for layer in self.dense_layers}

    @abstractmethod
    def pattern(self, num_kv_heads: int = 1) -> Pattern | None:
        """The static block pattern of this method, or None where it has none (full attention, learned selections).

        ``num_kv_heads`` matters only to patterns that differ by head (LongNet with head shifts).
        """

    @abstractmethod
    def build(self, num_kv_heads: int = 1) -> Method:
        """The object that attends for the layers using this method; ``num_kv_heads`` as in :meth:`pattern`."""


class DecodeState(ABC):
    """What one layer keeps of the past in generation, for a method that needs no cache of all keys and values."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the batch; 0 before the first tokens."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Every row of the batch has read a token."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch (int64), in this order; a row may come more than once."""


class Method(ABC):
    """How one method attends. Built once a model from its config and shared by all the layers that use it."""

    extra_inputs: ClassVar[frozenset[str]] = frozenset()
    """Names of the arguments that the hooks of :meth:`attach` add to a layer's call and :meth:`attend` takes: tensors
    ``[B, heads, N]``, one value a token of the call."""

    selection_operations: ClassVar[frozenset[str]] = frozenset()
    """PyTorch operations (``namespace::name``) that select what :meth:`attend` reads, whose outputs activation
    checkpointing keeps instead of selecting again."""

    observing: bool = False
    """While True, a method with telemetry keeps statistics of every call of :meth:`attend` for
    :meth:`observations`."""

    def attach(self, layer: nn.Module, layer_index: int) -> None:  # noqa: B027 (most methods need nothing)
        """Add what the method needs (submodules, forward pre-hooks) to one attention layer.

        A layer that already carries it, from an earlier call, keeps its weights.
        """

    def detach(self, layer: nn.Module) -> None:  # noqa: B027 (what was never attached need not go)
        """Take away what :meth:`attach` added, before the layer takes another method.

        The weights are set aside with the layer, so that attaching the method again brings them back: evaluating a
        model dense in the middle of a run must not cost it what it has learned.
        """

    def new_state(self) -> DecodeState | None:
        """The memory of one layer for generation, or None for a method that reads a cache of all keys and values."""
        return None

    def attend_with_state(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        state: Any,
        starts: list[int] | None,
        **options: Any,
    ) -> torch.Tensor:
        """:meth:`attend` for methods with a :meth:`new_state`: what is not in the arguments is in ``state``, and the
        new tokens join it.

        Args:
            key, value: ``[B, Hkv, N, D]``, of the N new tokens only.
            state: what :meth:`new_state` made for this layer.
            starts: of each row, how many of the new tokens are padding on its left; None where none are.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    def begin_step(self, step: int, steps: int) -> None:  # noqa: B027 (most methods have no schedule)
        """Told before every optimizer step: the 0-based ``step`` of a run of ``steps``."""

    def observations(self) -> dict[str, float]:
        """What was kept while :attr:`observing`, by names such as ``sparsek/kept_mass/layer_03``; then forgets it."""
        return {}

    def lifetimes(self) -> dict[int, torch.Tensor]:
        """Of methods that drop keys: by layer, in how many rows each key of the last call made while :attr:`observing`
        was read after it had left the window, int32 ``[heads, N]``. What a run draws as ``selection.png``."""
        return {}

    def density(self, length: int) -> float:
        """Share of the causal pairs of ``length`` tokens that are attended."""
        return 1.0

    @abstractmethod
    def attend(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """Causal attention of one layer.

        Args:
            layer: the attention module that calls.
            query: ``[B, Hq, N, D]``, rotary position already applied.
            key, value: ``[B, Hkv, M, D]``, ``M >= N`` (a KV cache holds ``M - N`` earlier keys).
            options: always all of them. ``cu_seqlens``: int32 ``[documents + 1]`` for packed rows (``B == 1``,
                ``M == N``), else None. ``q_start``: position of the first query among the keys; None means ``M - N``.
                ``scale``: factor on the logits. ``softcap``: ``softcap * tanh(logits / softcap)`` or None (Gemma-2).
                ``sink_logits``: ``[Hq]`` learned logits in the softmax denominator, or None (gpt-oss). A method with
                :attr:`extra_inputs` takes those by name beside them.

        Returns:
            ``[B, Hq, N, D]`` in the query's dtype.
        """
