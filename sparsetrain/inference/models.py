"""The model that ``sparsetrain generate`` is given: a run, a trained folder, or any decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_model(name: str, *, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its attention method, on the host, and its tokenizer.

    Args:
        name: the folder of a run (its ``final/`` is taken), of a model or of adapters, a Hub id, or
            ``sparsetrain:tiny``. A model that records no method attends fully.
        dtype: of the weights; None leaves them as they are stored.

    Raises:
        ModelError: it cannot be read.
    """
    from sparsetrain.modeling import load, sparsify
    from sparsetrain.modeling.configs import saved_source
    from sparsetrain.modeling.places import ADAPTER_FILE, resolve
    from sparsetrain.modeling.tokenizers import load_tokenizer
    from sparsetrain.modeling.weights import load_weights

    folder = Path(name) / "final"
    path = resolve(str(folder) if (Path(name) / "recipe.yaml").is_file() and folder.is_dir() else name, "MODEL")
    tokenizer = load_tokenizer(path, "MODEL (its tokenizer)")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if (Path(path) / ADAPTER_FILE).is_file():
        return load(path, **options), tokenizer
    source = saved_source(path, "MODEL")
    if source.values.get("sparsetrain") is not None:
        return load(path, **options), tokenizer
    model = load_weights(path, "MODEL", **{"config": source.config(), **options})
    return sparsify(model, {"method": "full"}), tokenizer


def check_room(model: PreTrainedModel, place: str, tokens: int, new_tokens: int) -> None:
    """Refuse a prompt that leaves the model's positions.

    Args:
        place: of the prompt.
        tokens: of the prompt.
        new_tokens: the most that are written.

    Raises:
        ModelError: names the numbers and what to set.
    """
    from sparsetrain.modeling.positions import position_limit

    limit = position_limit(model)
    if limit is None or tokens + new_tokens <= limit:
        return
    if tokens < limit:
        raise ModelError(
            f"{place}: {tokens} tokens and --max-new-tokens {new_tokens} are more than the {limit} positions of the "
            f"model (max_position_embeddings); set --max-new-tokens to at most {limit - tokens}"
        )
    raise ModelError(
        f"{place}: {tokens} tokens are as many as the {limit} positions of the model (max_position_embeddings) or "
        "more, which leaves none to write; shorten it, or take a model trained for longer rows"
    )
