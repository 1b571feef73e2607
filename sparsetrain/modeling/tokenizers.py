"""Load the tokenizer of a model, test it, and compare it with the model's vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from sparsetrain.errors import ModelError
from sparsetrain.modeling.boundary import explained
from sparsetrain.modeling.places import remedy, resolve
from sparsetrain.recipe.added_tokens import add_control_tokens
from sparsetrain.recipe.chat_templates import chat_template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection

SAMPLE = "A line of text, 12 + 34.\n"


def recipe_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe (``model.tokenizer``, or the model's own) with its chat template and added tokens.

    Raises:
        ModelError: It cannot be loaded, or cannot encode.
        RecipeError: There is no such chat template.
    """
    return tokenizer_and_new_tokens(section)[0]


def tokenizer_and_new_tokens(section: ModelSection) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a recipe, and those of ``model.add_tokens`` that it did not have.

    Raises:
        ModelError, RecipeError: As in :func:`recipe_tokenizer`.
    """
    code = {"trust_remote_code": section.trust_remote_code}
    if section.tokenizer is not None:
        tokenizer = load_tokenizer(resolve(section.tokenizer, "model.tokenizer"), "model.tokenizer", **code)
    else:
        path = resolve(str(section.path), "model.path")
        tokenizer = load_tokenizer(path, "model.path (tokenizer)", revision=section.revision, **code)
    if section.chat_template is not None:
        tokenizer.chat_template = chat_template_text(section.chat_template)
    return tokenizer, add_control_tokens(tokenizer, section.add_tokens)


def load_tokenizer(path: str | Path, field: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub, and test it on a line of text.

    Args:
        field: The name of the setting in error messages.
        options: Options of ``AutoTokenizer.from_pretrained``.

    Raises:
        ModelError: It cannot be loaded, or cannot encode.
    """
    name = str(path)
    options.setdefault("trust_remote_code", False)  # if unset, transformers may prompt the user
    with explained(partial(_fault, name, field), remedy(field, name)):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 1:
        raise ModelError(f"{field}={name!r}: model_max_length={limit!r:.60} in tokenizer_config.json is not a length")
    with explained(f"{field}={name!r}: the tokenizer cannot encode a line of text"):
        ids = tokenizer(SAMPLE)["input_ids"]
        tokenizer.decode(ids)
        vocabulary = tokenizer.get_vocab()
    if not ids or not vocabulary:
        raise ModelError(f"{field}={name!r}: the tokenizer makes no tokens of a line of text")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any, added: Collection[str] = ()) -> None:
    """Refuse a tokenizer with more tokens than the model's embedding has rows.

    Args:
        added: Tokens that were added to it, for which the model gets rows.

    Raises:
        ModelError: It has more; names both numbers.
    """
    needed = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=-1) + 1
    rows = config.get_text_config(decoder=True).vocab_size
    if needed > rows:
        raise ModelError(
            f"the tokenizer has {needed} token ids but the model's embedding only {rows} rows; use the model's own "
            "tokenizer (model.tokenizer), or for random weights set vocab_size in model.architecture"
        )


def _fault(name: str, field: str, error: BaseException) -> str:
    own = ", it needs custom code, which runs only with trust_remote_code"
    return f"{_blame(name, field)} cannot be loaded{own if 'trust_remote_code' in str(error) else ''}"


def _blame(name: str, field: str) -> str:
    """The field, and the damaged file if it can be found."""
    file = Path(name) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except BaseException as error:  # panics of tokenizers are not subclasses of Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            return f"{field}={name!r}: {file.name}"
        return f"{field}={name!r}: tokenizer_config.json or a file beside it"
    return f"{field}={name!r}"
