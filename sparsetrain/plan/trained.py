"""Numbers of parameters and trained parameters of a run, by part of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sparsetrain.methods.costs import NewParameters
from sparsetrain.plan.shape import ModelShape
from sparsetrain.recipe.freezing import frozen
from sparsetrain.recipe.lora_section import LoraSection
from sparsetrain.recipe.lora_targets import layers_named, tied_head
from sparsetrain.recipe.schema import Recipe

HEAD, EMBEDDING = "lm_head", "embed_tokens"


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters."""

    matrices: int
    """Linear layers of the decoder, without adapters."""
    embedding: int
    head: int
    """The output projection; 0 if it is tied to the embedding."""
    norms: int
    biases: int
    adapters: int
    new_modules: int
    """Trained parameters that the attention method adds."""
    largest_matrix: int
    trained_decayed: int
    """Trained, in the optimizer group with weight decay: matrices."""
    trained_undecayed: int
    """Trained, in the group without: norms, biases, embeddings."""
    largest_trained: int
    """Elements of the largest tensor that is trained."""
    trains_matrices: bool
    """Whether the decoder's own matrices get gradients."""
    trains_head: bool
    trains_embedding: bool
    trains_norms: bool
    targets: frozenset[str]
    """Projections that have an adapter, in every layer or in some."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrices + self.embedding + self.head + self.norms + self.biases + self.adapters + self.new_modules

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.trained_decayed + self.trained_undecayed


def count_parameters(shape: ModelShape, recipe: Recipe, added: NewParameters) -> Parameters:
    """Count what :func:`sparsetrain.training.trainable.choose_trainable` would leave to train.

    Args:
        added: what the attention method adds to a layer.

    Raises:
        RecipeError: ``lora.targets`` matches nothing, or a head that is tied.
    """
    attention, mlp = _attention(shape), _mlp(shape)
    sizes = attention | mlp
    layer = sum(rows * columns for rows, columns in sizes.values())
    matrices = shape.layers * layer
    embedding = shape.vocab * shape.hidden
    head = 0 if shape.tied else embedding
    biases = shape.layers * (shape.q_width + 2 * shape.kv_width) if shape.qkv_bias else 0
    norms = shape.layers * (2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)) + shape.hidden
    sparse_layers = shape.layers - len(recipe.attention.resolve_dense_layers(shape.layers))
    new_matrices, new_vectors = sparse_layers * added.matrices, sparse_layers * added.vectors

    lora, only_new = recipe.lora, recipe.train.parameters == "new_modules"
    full = lora is None and not only_new
    adapted = Counter[str]() if lora is None else _adapted(shape, lora, attention, mlp)
    sides = {**sizes, HEAD: (shape.vocab, shape.hidden)}
    adapters = 0
    if lora is not None:
        each = {name: lora.rank * sum(sides[name]) + (sides[name][0] if lora.dora else 0) for name in adapted}
        adapters = sum(each[name] * count for name, count in adapted.items())
    # A tied head is trained with the embedding; peft trains an untied one never.
    trains_embedding = full or (lora is not None and lora.train_embeddings)
    trains_head = full or (shape.tied and trains_embedding)
    trains_norms = full or (lora is not None and lora.train_norms)
    decayed = (matrices + head if full else adapters) + new_matrices
    undecayed = (embedding if trains_embedding else 0) + (norms if trains_norms else 0) + (biases if full else 0)
    undecayed += new_vectors
    trains_matrices = full
    if recipe.train.freeze:
        stays = _frozen(shape, recipe.train.freeze, sizes)
        trains_embedding, trains_head = EMBEDDING not in stays, trains_head and HEAD not in stays
        trains_matrices = matrices > stays["matrices"]
        decayed -= stays["matrices"] + (head if HEAD in stays else 0)
        undecayed -= stays["vectors"] + (embedding if EMBEDDING in stays else 0)
    largest = max(
        embedding if trains_embedding or trains_head else 0,
        max(rows * columns for rows, columns in sizes.values()) if trains_matrices else 0,
        lora.rank * max(max(sides[name]) for name in adapted) if lora is not None else 0,
        added.largest if sparse_layers else 0,
    )
    return Parameters(
        matrices=matrices,
        embedding=embedding,
        head=head,
        norms=norms,
        biases=biases,
        adapters=adapters,
        new_modules=new_matrices + new_vectors,
        largest_matrix=max(rows * columns for rows, columns in sizes.values()),
        trained_decayed=decayed,
        trained_undecayed=undecayed,
        largest_trained=largest,
        trains_matrices=trains_matrices,
        trains_head=trains_head,
        trains_embedding=trains_embedding,
        trains_norms=trains_norms,
        targets=frozenset(adapted),
    )


def _frozen(shape: ModelShape, names: Sequence[str], sizes: dict[str, tuple[int, int]]) -> Counter[str]:
    """Elements of the ``matrices`` and ``vectors`` of the layers that are frozen, and entries for the embedding and the
    head if these are."""
    paths = {f"{HEAD}.weight": (HEAD, 1), f"{shape.decoder}.{EMBEDDING}.weight": (EMBEDDING, 1)}
    paths[f"{shape.decoder}.norm.weight"] = ("vectors", shape.hidden)
    biased = {"q_proj": shape.q_width, "k_proj": shape.kv_width, "v_proj": shape.kv_width} if shape.qkv_bias else {}
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
    norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim} if shape.qk_norm else {}
    inside = _mlp(shape)
    for index in range(shape.layers):
        layer = f"{shape.decoder}.layers.{index}"
        for name, (rows, columns) in sizes.items():
            paths[f"{layer}.{'mlp' if name in inside else 'self_attn'}.{name}.weight"] = ("matrices", rows * columns)
        paths |= {f"{layer}.self_attn.{name}.bias": ("vectors", size) for name, size in biased.items()}
        paths |= {f"{layer}.{name}.weight": ("vectors", size) for name, size in norms.items()}
    found: Counter[str] = Counter()
    for path in frozen(paths, names, "the model"):
        found[paths[path][0]] += paths[path][1]
    if shape.tied and (HEAD in found or EMBEDDING in found):
        found[HEAD] = found[EMBEDDING] = 1
    return found


def _attention(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Rows and columns of each attention projection of a layer."""
    q, kv, hidden = shape.q_width, shape.kv_width, shape.hidden
    split = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    return ({"qkv_proj": (q + 2 * kv, hidden)} if shape.fused_qkv else split) | {"o_proj": (hidden, q)}


def _mlp(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Rows and columns of each MLP projection of a layer."""
    wide, hidden = shape.intermediate, shape.hidden
    split = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden)}
    return ({"gate_up_proj": (2 * wide, hidden)} if shape.fused_gate_up else split) | {"down_proj": (hidden, wide)}


def _adapted(shape: ModelShape, lora: LoraSection, attention: Collection[str], mlp: Collection[str]) -> Counter[str]:
    """The number of layers with an adapter at each projection, as in :mod:`sparsetrain.modeling.adapters`."""
    layers = [f"{shape.decoder}.layers.{index}" for index in range(shape.layers)]
    paths = {f"{layer}.self_attn.{name}": name for layer in layers for name in attention}
    if lora.targets != "attention":
        paths |= {f"{layer}.mlp.{name}": name for layer in layers for name in mlp}
    if lora.targets in ("attention", "linear"):
        return Counter(paths.values())
    paths[HEAD] = HEAD
    chosen = layers_named(lora.targets, paths, "the model")
    if shape.tied and HEAD in chosen:
        raise tied_head()
    return Counter(paths[path] for path in chosen)
