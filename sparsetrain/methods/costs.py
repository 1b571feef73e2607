"""The costs of a method for ``sparsetrain plan``: rates, bytes and parameters of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """The properties of an attention layer in training on which its costs depend."""

    hidden: int
    """Hidden size of the layer's input."""
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    length: int
    """Tokens of a row."""
    tokens: int
    """Tokens of a micro batch on one rank."""
    hopper: bool
    """Whether the GPU runs the Hopper kernels."""


@dataclass(frozen=True)
class AttentionRate:
    """Rates of one attention implementation at head dims 128 and 64, on one H200 in bf16."""

    forward: tuple[float, float]
    """FLOP/s over the attended pairs, for head dims 128 and 64."""
    backward: tuple[float, float]
    """The same for backward, counted as 2.5 times forward."""


@dataclass(frozen=True)
class NewParameters:
    """The trained parameters that a method adds to one layer."""

    matrices: int
    """Elements of tensors with two or more dimensions, which have weight decay."""
    vectors: int
    """Elements of tensors with one dimension, without weight decay."""
    largest: int
    """Elements of the largest tensor."""


NO_PARAMETERS = NewParameters(0, 0, 0)


@dataclass(frozen=True)
class AttentionCosts:
    """The costs of one layer of a method in training. Only the note has a default: a plan must not guess."""

    rate: AttentionRate
    backward_bytes: float
    """Bytes per token that the operation needs in backward, besides inputs, output and their gradients."""
    saved_bytes: float
    """Bytes per token that it saves for backward besides inputs, output and log-sum-exp, such as a selection."""
    keeps_input: bool
    """Whether its new modules save the layer's input for backward."""
    parameters: NewParameters
    note: str | None = None
    """A sentence to add to the plan."""
