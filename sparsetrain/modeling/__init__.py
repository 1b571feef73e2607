"""Put an attention method into a Hugging Face decoder, save the model with it, and load it again."""

from __future__ import annotations

from sparsetrain.modeling.configs import check_dropout, load_config
from sparsetrain.modeling.decode_section import set_decode
from sparsetrain.modeling.fit import fit_method
from sparsetrain.modeling.head import balance_factor, has_plain_head
from sparsetrain.modeling.layers import attention_density, sparse_layers, sparsify
from sparsetrain.modeling.loading import load
from sparsetrain.modeling.positions import check_learned_positions, check_positions
from sparsetrain.modeling.sparse_cache import SparseCache
from sparsetrain.modeling.storage import load_model, save

__all__ = [
    "SparseCache",
    "attention_density",
    "balance_factor",
    "check_dropout",
    "check_learned_positions",
    "check_positions",
    "fit_method",
    "has_plain_head",
    "load",
    "load_config",
    "load_model",
    "save",
    "set_decode",
    "sparse_layers",
    "sparsify",
]
