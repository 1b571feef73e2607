"""The model that ``sparsetrain generate`` is given: a run, a trained folder, or any decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError
from sparsetrain.nearest import nearest_first

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "RUN_OR_MODEL"
"""What messages call the argument of commands."""


@dataclass(frozen=True)
class Source:
    """A model whose small files were read and found to fit, before its weights are."""

    path: str
    """A folder or a Hub id."""
    outline: PreTrainedModel
    """The model without weights, with its attention method, decode section and generation config."""
    tokenizer: PreTrainedTokenizerBase
    field: str = MODEL
    """The argument or field that names it, for messages."""

    @property
    def has_adapters(self) -> bool:
        """Whether it is a folder of adapters, beside their base."""
        from sparsetrain.modeling.places import ADAPTER_FILE

        return (Path(self.path) / ADAPTER_FILE).is_file()

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its attention method, on the host.

        Args:
            dtype: of the weights; None leaves them as they are stored.

        Raises:
            ModelError: it cannot be read.
        """
        from sparsetrain.modeling import load, sparsify
        from sparsetrain.modeling.configs import saved_source
        from sparsetrain.modeling.weights import load_weights

        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if self.has_adapters:
            return load(self.path, **options)
        source = saved_source(self.path, self.field)
        if source.values.get("sparsetrain") is not None:
            return load(self.path, **options)
        weights = load_weights(self.path, self.field, **{"config": source.config(), **options})
        return sparsify(weights, {"method": "full"})


def find_model(name: str, field: str = MODEL) -> Source:
    """The model that a command or a recipe was given; nothing of its weights is read.

    Args:
        name: the folder of a run (its ``final/`` is taken), of a model or of adapters, a Hub id, or
            ``sparsetrain:tiny``. A model that records no method attends fully.
        field: the argument or field of a recipe that names it, for messages.

    Raises:
        ModelError: it is not found, is a recipe, or its files are damaged.
    """
    from sparsetrain.modeling.outline import outline
    from sparsetrain.modeling.places import MODEL_FILES, resolve
    from sparsetrain.modeling.tokenizers import load_tokenizer
    from sparsetrain.recipe.mistaken import is_recipe_instead

    if (advice := is_recipe_instead(name)) is not None:
        raise ModelError(f"{field}={name!r}: {advice}")
    folder = Path(name) / "final"
    path = resolve(str(folder) if (Path(name) / "recipe.yaml").is_file() and folder.is_dir() else name, field)
    try:
        tokenizer = load_tokenizer(path, f"{field} (its tokenizer)")
    except ModelError as error:
        if beside := _runs_beside(Path(name)):
            raise ModelError(f"{field}={name!r} is no run and no model; name a run: {', '.join(beside)}") from error
        if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in MODEL_FILES):
            raise ModelError(
                f"{field}={name!r} holds no model (no {' or '.join(MODEL_FILES)}); give a run, its final/ or a model"
            ) from error
        raise
    return Source(path, outline(path, field), tokenizer, field)


def _runs_beside(folder: Path) -> list[str]:
    """The runs in a folder, or those beside a folder that is not there; the nearest names first."""
    from sparsetrain.modeling.places import MODEL_FILES

    if any((folder / file).is_file() for file in (*MODEL_FILES, "recipe.yaml")):
        return []
    place = folder if folder.is_dir() else folder.parent
    runs = [str(file.parent) for file in sorted(place.glob("*/recipe.yaml"))]
    return nearest_first(folder, runs, most=5)


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
