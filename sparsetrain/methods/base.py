"""The seam of a method: its section of a recipe, and the object a layer calls instead of dense attention.

What a run would otherwise get silently wrong is abstract: pattern, costs, density, attention and its oracle. A class
that names a method and lacks one of them is refused where it is defined. docs/adding-a-method.md has examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, Unpack, get_origin

from pydantic import Field, PositiveInt, model_validator

from sparsetrain.errors import ModelError
from sparsetrain.methods.costs import AttentionCosts, LayerShape
from sparsetrain.methods.fit import LayerFit
from sparsetrain.methods.memory import Memory
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

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if get_origin(cls.model_fields["method"].annotation) is Literal and cls.__abstractmethods__:
            raise TypeError(f"{cls.__name__} names a method but lacks {', '.join(sorted(cls.__abstractmethods__))}")

    @abstractmethod
    def pattern(self, num_kv_heads: int = 1) -> Pattern | None:
        """The static block pattern of this method, or None where it has none (full attention, learned selections).

        ``num_kv_heads`` matters only to patterns that differ by head (LongNet with head shifts).
        """

    @abstractmethod
    def build(self, num_kv_heads: int = 1) -> Method:
        """The object that attends for the layers using this method; ``num_kv_heads`` as in :meth:`pattern`."""

    @abstractmethod
    def costs(self, shape: LayerShape) -> AttentionCosts:
        """What ``sparsetrain plan`` counts of one layer in training."""

    def pattern_drawn(self, length: int, num_kv_heads: int = 1) -> Pattern | None:
        """The pattern that pictures of ``length`` tokens show; None where there is none to draw."""
        return self.pattern(num_kv_heads)

    @property
    def waits_for_fit(self) -> bool:
        """Layers have weights that are fitted to text before step 1 (:meth:`Method.fit`)."""
        return False

    def settled(self) -> Self:
        """This config as it is at the end of its schedule over the steps of a run."""
        return self

    def heads_fault(self, num_kv_heads: int) -> str | None:
        """Why ranks cannot share out a layer's heads (``sequence.parallel``), and what to set; None if they can."""
        pattern = self.pattern(num_kv_heads)
        if pattern is None or not pattern.per_head:
            return None
        return f"attention.method={self.method} gives each head its own pattern by its number in the model; set it to 1"

    def training_fault(self) -> str | None:
        """Why a run cannot train the new modules alone, and what to set (``train.parameters: new_modules``)."""
        return None


class Expected(NamedTuple):
    """What a layer should have answered at some rows of a packed row."""

    rows: torch.Tensor
    """int64 ``[R]``."""
    output: torch.Tensor
    """fp64 ``[1, Hq, R, D]``."""


class Method(ABC):
    """How one method attends. Built once a model from its config and shared by all the layers that use it."""

    dense: ClassVar[bool] = False
    """:meth:`attend` is full attention: there is no sparse layer to check before step 1."""

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

    def memory(self) -> Memory | None:
        """The memory of one layer for generation, or None for a method that reads a cache of all keys and values."""
        return None

    def fit(self, layer: nn.Module) -> LayerFit | None:
        """What fits the layer's new modules to text before training; None where there is nothing to fit."""
        return None

    def needs_fit(self, layer: nn.Module) -> bool:
        """The layer has weights that still wait for :meth:`fit`."""
        return False

    def fit_tokens(self, lengths: Sequence[int]) -> int:
        """How many tokens of a row with documents of these lengths a fit learns from."""
        return sum(lengths)

    def begin_step(self, step: int, steps: int) -> None:  # noqa: B027 (most methods have no schedule)
        """Told before every optimizer step: the 0-based ``step`` of a run of ``steps``."""

    def observations(self) -> dict[str, float]:
        """What was kept while :attr:`observing`, by names such as ``sparsek/kept_mass/layer_03``; then forgets it."""
        return {}

    def lifetimes(self) -> dict[int, torch.Tensor]:
        """Of methods that drop keys: by layer, in how many rows each key of the last call made while :attr:`observing`
        was read after it had left the window, int32 ``[heads, N]``. What a run draws as ``selection.png``."""
        return {}

    @abstractmethod
    def density(self, length: int) -> float:
        """Share of the causal pairs of ``length`` tokens that are attended."""

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

    @abstractmethod
    def expected(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        document: slice,
        **options: Unpack[AttentionOptions],
    ) -> Expected:
        """The oracle: what :meth:`attend` should have returned for one document of a packed row, in fp64.

        Before step 1 every run compares its first sparse layer with this. It follows the definition of the method,
        row by row if need be, and shares no kernel with :meth:`attend`.

        Args:
            query: ``[1, Hq, N, D]``.
            key, value: ``[1, Hkv, N, D]``.
            document: the rows of the document.
            options: those of the call.

        Returns:
            As many rows as are affordable, and what they should be.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        lacking = sorted(name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False))
        if lacking:
            raise TypeError(f"{cls.__name__} is a method but lacks {', '.join(lacking)}")
