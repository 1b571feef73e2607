"""What ``sparsetrain plan`` counts of a method: the rates, bytes and parameters of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One attention layer in training, as far as its costs depend on it."""

    hidden: int
    """Width of the layer's input."""
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    length: int
    """Tokens of a row."""
    tokens: int
    """Tokens of a micro batch on one rank."""
    hopper: bool
    """The GPU runs the Hopper kernels."""


@dataclass(frozen=True)
class AttentionRate:
    """Rates of one attention implementation at head dims 128 and 64, on one H200 in bf16."""

    forward: tuple[float, float]
    """FLOP/s over the pairs that are attended, heads of 128 and of 64."""
    backward: tuple[float, float]
    """The same for backward, counted as 2.5 times forward."""


@dataclass(frozen=True)
class NewParameters:
    """What a method adds to one layer and trains."""

    matrices: int
    """Elements of tensors with two dimensions or more, which have weight decay."""
    vectors: int
    """Elements of the others."""
    largest: int
    """Elements of the largest tensor."""


NO_PARAMETERS = NewParameters(0, 0, 0)


@dataclass(frozen=True)
class AttentionCosts:
    """One layer of a method in training. Nothing has a default but the note: a plan must not guess."""

    rate: AttentionRate
    backward_bytes: float
    """Bytes for each token that the operation needs in backward, beyond its inputs, its output and their gradients."""
    saved_bytes: float
    """Bytes for each token that it keeps for backward besides inputs, output and log-sum-exp: a selection."""
    keeps_input: bool
    """Its new modules keep the layer's input for backward."""
    parameters: NewParameters
    note: str | None = None
    """A sentence that a plan adds."""
