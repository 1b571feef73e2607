"""The interface of an attention method: its config, and the object that a layer calls instead of dense attention.

Pattern, costs, density, attention and its oracle are abstract, so that no run uses a wrong default. A method class that
lacks one of them raises when it is defined. See docs/adding-a-method.md for examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    """The ``attention`` section of a recipe: the method, its parameters, and the layers that stay dense."""

    new_modules: ClassVar[tuple[str, ...]] = ()
    """Attribute names of the submodules that :meth:`Method.attach` adds to an attention layer. A run can train only
    these, or use a separate learning rate for them, and adapter folders include them."""
    added_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that were added after models with this method had been saved. Their records lack them, and mean the
    default, which must be what the method did before."""

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
            ModelError: A listed layer does not exist.
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
            raise TypeError(f"{cls.__name__} defines a method but lacks {', '.join(sorted(cls.__abstractmethods__))}")

    @abstractmethod
    def pattern(self, num_kv_heads: int = 1) -> Pattern | None:
        """The static block pattern of this method; None for full attention and learned selections.

        ``num_kv_heads`` is used only by patterns that differ by head (LongNet with head shifts).
        """

    @abstractmethod
    def build(self, num_kv_heads: int = 1) -> Method:
        """Create the object that computes attention for the layers; ``num_kv_heads`` as in :meth:`pattern`."""

    @abstractmethod
    def costs(self, shape: LayerShape) -> AttentionCosts:
        """The costs of one layer in training, for ``sparsetrain plan``."""

    def pattern_drawn(self, length: int, num_kv_heads: int = 1) -> Pattern | None:
        """The pattern to draw for ``length`` tokens; None if there is none."""
        return self.pattern(num_kv_heads)

    def decode_section(self) -> Mapping[str, Any] | None:
        """The fields of the ``decode`` section that the method is trained for, without ``dense_layers``; generation
        uses it unless another is set. None: the method itself says what generation reads."""
        return None

    @property
    def waits_for_fit(self) -> bool:
        """Whether layers have weights that are fitted to text before step 1 (:meth:`Method.fit`)."""
        return False

    def settled(self) -> Self:
        """This config at the end of its schedule over the steps of a run."""
        return self

    def heads_fault(self, num_kv_heads: int, parallel: int) -> str | None:
        """The reason why a layer's heads cannot be divided among ``parallel`` ranks (``sequence.parallel``), with a
        fix; None if they can. Of fewer KV heads than ranks, several ranks have a copy and a part of its query heads."""
        pattern = self.pattern(num_kv_heads)
        if pattern is None or not pattern.per_head:
            return None
        return f"attention.method={self.method} gives each head its own pattern by its number in the model; set it to 1"

    def training_fault(self) -> str | None:
        """The reason why a run cannot train only the new modules (``train.parameters: new_modules``), with a fix; None
        if it can."""
        return None


class PassDocuments(NamedTuple):
    """The documents of one forward pass over a packed row."""

    bounds: Sequence[int]
    """The start of each document, and the tokens of the row."""
    prompts: Sequence[int]
    """Tokens of each document before its first target, all where it has none."""
    names: Sequence[str]
    """The name of each document; of padding at the end there is none."""
    seed: int | None = None
    """Seed of a training pass; None in evaluation, where nothing is drawn."""
    step: int = 0
    """Step of a training pass, 0-based."""


class Expected(NamedTuple):
    """The expected output of a layer at some positions of a packed row."""

    rows: torch.Tensor
    """int64 ``[R]``."""
    output: torch.Tensor
    """fp64 ``[1, Hq, R, D]``."""


class Method(ABC):
    """The attention of one method. Built once per model from its config, and shared by all layers that use it, unless
    :meth:`of_layer` gives them others."""

    dense: ClassVar[bool] = False
    """Whether :meth:`attend` is full attention, so that there is no sparse layer to check before step 1."""

    extra_inputs: ClassVar[frozenset[str]] = frozenset()
    """Names of the arguments that the hooks of :meth:`attach` add to a layer's call and that :meth:`attend` takes:
    tensors ``[B, heads, N]``, one value per token of the call."""

    pass_input: ClassVar[str | None] = None
    """Name of the argument of :meth:`attend` that holds the result of :meth:`plan_pass`."""

    decodes_all: ClassVar[bool] = False
    """Whether generation keeps all keys and reads them by full attention, or the choice of them that
    :meth:`MethodConfig.decode_section` names."""

    selection_operations: ClassVar[frozenset[str]] = frozenset()
    """PyTorch operations (``namespace::name``) that select the keys :meth:`attend` reads. Activation checkpointing
    keeps their outputs instead of recomputing them."""

    observing: bool = False
    """While True, a method with telemetry keeps statistics of every call of :meth:`attend` for
    :meth:`observations`."""

    def of_layer(self, position: int) -> Method:
        """The method of one layer: itself, unless layers differ.

        Args:
            position: of the layer among those that take the method, from 0.
        """
        return self

    def attach(self, layer: nn.Module, layer_index: int) -> None:  # noqa: B027 (most methods need nothing)
        """Add what the method needs (submodules, forward pre-hooks) to one attention layer.

        A layer that already has the submodules, from an earlier call, keeps their weights.
        """

    def detach(self, layer: nn.Module) -> None:  # noqa: B027 (most methods attach nothing)
        """Remove what :meth:`attach` added, before the layer gets another method.

        The weights are kept with the layer, and attaching the method again restores them: evaluating a model with dense
        attention in the middle of a run must not lose trained weights.
        """

    def plan_pass(self, documents: PassDocuments) -> Any:
        """What :meth:`attend` needs to know about the documents of a pass besides their bounds, such as which part of
        them is a prompt. All layers get the same object, also when they are recomputed. None: nothing.

        Training and the evaluation tasks ask for it. Other passes, such as a user's own call of the model, go without.
        """
        return None

    def memory(self) -> Memory | None:
        """The memory of one layer for generation. None means pages of keys and values: all, or those that a static
        pattern still reads."""
        return None

    def fit(self, layer: nn.Module) -> LayerFit | None:
        """The fit of the layer's new modules to text before training; None if there is nothing to fit."""
        return None

    def needs_fit(self, layer: nn.Module) -> bool:
        """Whether the layer has weights that :meth:`fit` has not fitted yet."""
        return False

    def fit_tokens(self, lengths: Sequence[int]) -> int:
        """The number of tokens that a fit can use from a row with documents of these lengths."""
        return sum(lengths)

    def begin_step(self, step: int, steps: int) -> None:  # noqa: B027 (most methods have no schedule)
        """Called before every optimizer step with the 0-based ``step`` of a run of ``steps``."""

    def observations(self) -> dict[str, float]:
        """Return and reset the statistics kept while :attr:`observing`, by names such as
        ``sparsek/kept_mass/layer_03``."""
        return {}

    def lifetimes(self) -> dict[int, torch.Tensor]:
        """Lifetimes of keys by layer, for methods that drop keys; a run draws them as ``selection.png``.

        Returns:
            For each layer, int32 ``[heads, N]``: the number of queries that read a key after it left the window, in the
            last call made while :attr:`observing`.
        """
        return {}

    @abstractmethod
    def density(self, length: int) -> float:
        """The fraction of the causal pairs of ``length`` tokens that is attended."""

    def keys_read(
        self,
        layer: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rows: torch.Tensor,
        **options: Unpack[AttentionOptions],
    ) -> torch.Tensor:
        """The keys that :meth:`attend` reads for some tokens, in evaluation. The task ``attention_error`` asks for it,
        and refuses a method that does not define it.

        Args:
            query: ``[1, Hq, N, D]``, of one document.
            key, value: ``[1, Hkv, N, D]``.
            rows: int64 ``[R]``, positions of these tokens.
            options: Those of the call of :meth:`attend`.

        Returns:
            bool ``[H, R, N]``, ``H`` being 1 where all heads read the same keys, else ``Hkv``.
        """
        raise ModelError(f"{type(self).__name__} does not say which keys a token reads (keys_read)")

    @property
    def says_keys_read(self) -> bool:
        """Whether the method defines :meth:`keys_read`."""
        return type(self).keys_read is not Method.keys_read

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
            layer: The calling attention module.
            query: ``[B, Hq, N, D]``, rotary position already applied.
            key, value: ``[B, Hkv, M, D]``, ``M >= N`` (a KV cache holds ``M - N`` earlier keys).
            options: All are always given. ``cu_seqlens``: int32 ``[documents + 1]`` for packed rows (``B == 1``,
                ``M == N``), else None. ``q_start``: position of the first query among the keys; None means ``M - N``.
                ``scale``: factor on the logits. ``softcap``: ``softcap * tanh(logits / softcap)`` or None (Gemma-2).
                ``sink_logits``: ``[Hq]`` learned logits in the softmax denominator, or None (gpt-oss). The
                :attr:`extra_inputs` of the method are passed by name, too.

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
        """The oracle: the expected result of :meth:`attend` for one document of a packed row, in fp64.

        Before step 1 every run compares its first sparse layer with it. It follows the definition of the method, row by
        row if necessary, and shares no kernel with :meth:`attend`.

        Args:
            query: ``[1, Hq, N, D]``.
            key, value: ``[1, Hkv, N, D]``.
            document: The positions of the document in the row.
            options: The options of the call.

        Returns:
            Some positions (as many as are affordable), and the expected output there.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        lacking = sorted(name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False))
        if lacking:
            raise TypeError(f"{cls.__name__} is a method but lacks {', '.join(lacking)}")
