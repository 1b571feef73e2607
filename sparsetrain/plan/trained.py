"""How many parameters a run holds and how many it trains, by the part of the model they are in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsetrain.plan.shape import ModelShape
from sparsetrain.recipe.schema import LoraSection, Recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters."""

    matrices: int
    """Linear layers of the decoder, without adapters."""
    embedding: int
    head: int
    """The output projection; 0 where it is the embedding."""
    norms: int
    """Norms and biases."""
    adapters: int
    scorers: int
    """What the attention method adds."""
    largest_matrix: int
    trained_decayed: int
    """Trained, in the optimizer group with weight decay: matrices."""
    trained_undecayed: int
    """Trained, in the group without: norms, biases, embeddings."""
    largest_trained: int
    """Elements of the largest tensor that is trained."""
    trains_matrices: bool
    """The decoder's own matrices get gradients."""
    trains_head: bool
    trains_embedding: bool
    trains_norms: bool
    targets: frozenset[str]
    """Projections that have an adapter."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.embedding + self.head + self.norms + self.adapters + self.scorers

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.trained_decayed + self.trained_undecayed


def count_parameters(shape: ModelShape, recipe: Recipe) -> Parameters:
    """Count what :func:`sparsetrain.training.trainable.choose_trainable` would leave to train."""
    sizes = _projections(shape)
    layer = sum(rows * columns for rows, columns in sizes.values())
    matrices = shape.layers * layer
    embedding = shape.vocab * shape.hidden
    head = 0 if shape.tied else embedding
    biases = shape.q_width + 2 * shape.kv_width if shape.qkv_bias else 0
    norms = shape.layers * (2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0) + biases) + shape.hidden
    scorer_matrices, scorer_gains = _scorers(shape, recipe)
    scorers = scorer_matrices + scorer_gains

    lora, only_new = recipe.lora, recipe.train.parameters == "new_modules"
    full = lora is None and not only_new
    targets = frozenset() if lora is None else _targets(lora, frozenset(sizes))
    adapters = 0
    if lora is not None:
        each = {name: lora.rank * (rows + columns) for name, (rows, columns) in sizes.items()}
        adapters = shape.layers * sum(each[name] + (sizes[name][0] if lora.dora else 0) for name in targets)
    # A tied head is trained with the embedding; peft trains an untied one never.
    trains_embedding = full or (lora is not None and lora.train_embeddings)
    trains_head = full or (shape.tied and trains_embedding)
    trains_norms = full or (lora is not None and lora.train_norms)
    decayed = (matrices + head if full else adapters) + scorer_matrices
    undecayed = (embedding if trains_embedding else 0) + (norms if trains_norms else 0) + scorer_gains
    largest = max(
        embedding if trains_embedding or trains_head else 0,
        max(rows * columns for rows, columns in sizes.values()) if full else 0,
        lora.rank * max(shape.intermediate, shape.hidden) if lora is not None else 0,
        shape.kv_heads * shape.hidden if scorers else 0,
    )
    return Parameters(
        matrices=matrices,
        embedding=embedding,
        head=head,
        norms=norms,
        adapters=adapters,
        scorers=scorers,
        largest_matrix=max(rows * columns for rows, columns in sizes.values()),
        trained_decayed=decayed,
        trained_undecayed=undecayed,
        largest_trained=largest,
        trains_matrices=full,
        trains_head=trains_head,
        trains_embedding=trains_embedding,
        trains_norms=trains_norms,
        targets=targets,
    )


def _projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Rows and columns of each projection of a layer."""
    return {
        "q_proj": (shape.q_width, shape.hidden),
        "k_proj": (shape.kv_width, shape.hidden),
        "v_proj": (shape.kv_width, shape.hidden),
        "o_proj": (shape.hidden, shape.q_width),
        "gate_proj": (shape.intermediate, shape.hidden),
        "up_proj": (shape.intermediate, shape.hidden),
        "down_proj": (shape.hidden, shape.intermediate),
    }


def _targets(lora: LoraSection, names: frozenset[str]) -> frozenset[str]:
    """The projections with adapters. An expression is tried on the names in the first layer."""
    if lora.targets == "attention":
        return frozenset(ATTENTION)
    if lora.targets == "linear":
        return names
    whole = {name: f"model.layers.0.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in names}
    if isinstance(lora.targets, str):
        return frozenset(name for name, path in whole.items() if re.fullmatch(lora.targets, path))
    return frozenset(
        name for name, path in whole.items() for wanted in lora.targets if f".{path}".endswith(f".{wanted}")
    )


def _scorers(shape: ModelShape, recipe: Recipe) -> tuple[int, int]:
    """Trained numbers that the method adds: the matrices and the gains of SparseK's scorers."""
    attention = recipe.attention
    if attention.method != "sparsek" or attention.scorer != "learned":
        return 0, 0
    layers = shape.layers - len(attention.resolve_dense_layers(shape.layers))
    heads = shape.kv_heads if attention.scores == "head" else 1
    return layers * heads * shape.hidden, layers * heads if attention.normalize else 0
