"""Check a recipe's data before anything is loaded, with the first row of local files, without a model or torch.

``sparsetrain recipe validate``, ``plan``, ``doctor`` and ``run`` all begin with this check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.data.files import is_local
from sparsetrain.data.forms import resolve_form, takes_template
from sparsetrain.data.local_rows import STDLIB, first_row, local_files, readable_rows, refuse_hub_settings
from sparsetrain.data.turn_names import FIRST_ROWS, check_turn_names
from sparsetrain.data.values import FIX, MalformedRow, fix_or_skip
from sparsetrain.errors import DataError, first_line
from sparsetrain.recipe.added_tokens import add_control_tokens
from sparsetrain.recipe.chat_templates import chat_template_text
from sparsetrain.recipe.local_model import model_folder
from sparsetrain.source_section import ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.data.document import Tokens
    from sparsetrain.recipe.schema import Recipe
    from sparsetrain.source_section import DataSource

LARGEST_ROW = 2**20
"""Maximum number of characters of a first row that is rendered."""
LARGEST_ARRAY = 2**28
"""Maximum bytes of a JSON file that is read."""


@dataclass
class DataCheck:
    """The result of a successful check."""

    unchecked: list[str] = field(default_factory=list)
    """Data that could not be checked, so that only the run will."""
    remarks: list[str] = field(default_factory=list)
    """Notes for the user, one sentence each."""
    shown: list[str] = field(default_factory=list)
    """Descriptions of how each source is read, with the first row if it could be tokenised."""


@dataclass(frozen=True)
class _AnyTemplate:
    """A placeholder for a tokenizer that could not be read; it may have a chat template."""

    chat_template: Any = "unknown"


def check_data(recipe: Recipe) -> DataCheck:
    """Check files, columns, the first row of each source, the lengths of synthetic tasks, and the chat template.

    Nothing is read from the Hub. The tokenizer is read if it is in a local folder and needed for a check.

    Raises:
        DataError: Lists every fault that would stop the run, one per line.
    """
    check = DataCheck()
    faults: list[str] = []
    tokenizer = _tokenizer(recipe, check)
    chat = False
    for name, source, remedy, pairs in _sources(recipe):
        with _collected(faults, name):
            in_chat, tokens = _check_source(source, tokenizer, check, remedy, pairs)
            chat |= in_chat
            if tokens is not None and name.startswith("data."):
                check.remarks += _too_long(source, len(tokens.input_ids), recipe, pairs)
    if tokenizer is not None:
        _check_room(recipe, tokenizer, faults)
        if chat and tokenizer.chat_template:
            from sparsetrain.data.ending import remarks, turn_ending

            with _collected(faults, "model.tokenizer"):
                check.remarks += remarks(turn_ending(tokenizer), tokenizer)
    if faults:
        raise DataError("\n".join(dict.fromkeys(faults)))
    check.unchecked = list(dict.fromkeys(check.unchecked))
    return check


def _sources(recipe: Recipe) -> Iterator[tuple[str, DataSource, str | None, bool]]:
    """Yield every source with rows, with its field, what helps where a row is malformed (None: such rows are skipped),
    and whether its rows are pairs of answers."""
    remedy = None if recipe.data.on_malformed == "skip" else fix_or_skip("the row")
    for index, source in enumerate(recipe.data.sources):
        if source.path is not None:
            yield f"data.sources.{index}", source, remedy, recipe.preference is not None
    for task in recipe.eval.tasks:
        for name, source in task.sources().items():
            if source.path is not None:
                yield task.path(name), source, FIX, name in task.pair_fields


def _check_source(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    check: DataCheck,
    remedy: str | None,
    pairs: bool,
) -> tuple[bool, Tokens | None]:
    """Check a source; returns whether its rows go through the chat template (False if it cannot be read), and its first
    document, if it could be tokenised.

    Raises:
        DataError: The source has no readable rows.
    """
    seen = tokenizer or _AnyTemplate()
    if source.path == STDLIB:
        refuse_hub_settings(source)
        if source.split not in ("train", "validation"):
            raise DataError(f"data source {source.label!r}: {STDLIB} has the splits train and validation")
        resolve_form(source, ["text"], seen, pairs=pairs)
        return False, None
    if not is_local(str(source.path)):
        if source.validation is not None:
            raise DataError(
                f"data source {source.label!r}: validation holds rows out of local files, and there is no such file or "
                "folder here; of a Hub dataset, name a split"
            )
        check.unchecked.append(f"the Hub dataset {source.path} (there is no such file or folder here)")
        return False, None
    kind, files = local_files(source)
    if files[0].endswith(".json") and Path(files[0]).stat().st_size > LARGEST_ARRAY:
        check.unchecked.append(f"{files[0]} (an array of JSON is read whole)")
        return False, None
    skip = remedy is None
    place, row = first_row(source, kind, files, remedy=remedy)
    form = resolve_form(source, list(row), seen, pairs=pairs)
    if warning := check_turn_names(source, form, readable_rows(source, kind, files, skip=skip), most=FIRST_ROWS):
        check.remarks.append(warning)
    tokens = None
    if tokenizer is not None and len(str(row)) <= LARGEST_ROW:
        from sparsetrain.data.preview import preview
        from sparsetrain.data.render import render

        try:
            tokens = render(row, form, tokenizer)
        except MalformedRow as problem:
            if not skip:
                raise DataError(f"data source {source.label!r}: {place}: {problem}. {remedy}") from problem
        check.shown += preview(source.label, form.describe(), tokens, tokenizer)
    return takes_template(form, row, seen), tokens


def _too_long(source: DataSource, length: int, recipe: Recipe, pairs: bool) -> Iterator[str]:
    """A note if the first document does not fit a row and is not split."""
    room, long_documents = recipe.sequence.length, recipe.data.long_documents
    if length > room and long_documents != "split":
        done = "left out" if long_documents == "drop" else "cut to one row"
        yield (
            f"data source {source.label!r}: its first {'pair' if pairs else 'document'} has {length:,} tokens, more "
            f"than sequence.length={room}, and is {done} (data.long_documents={long_documents}); `sparsetrain data "
            "preview` counts all of them"
        )


def _check_room(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, faults: list[str]) -> None:
    """Add faults for synthetic tasks that do not fit their shortest document."""
    from sparsetrain.data.synthetic import synthetic_task
    from sparsetrain.randomness import generator

    for index, source in enumerate(recipe.data.sources):
        if source.synthetic:
            with _collected(faults, f"data.sources.{index}"):
                shortest = min(source.lengths, default=recipe.sequence.length)
                synthetic_task(source, tokenizer).document(min(shortest, ROOM), generator(0))
    for task in recipe.eval.tasks:
        try:
            task.try_inputs(tokenizer)
        except DataError as error:
            faults.append(str(error))


def _tokenizer(recipe: Recipe, check: DataCheck) -> PreTrainedTokenizerBase | None:
    """The recipe's tokenizer, if it is in a local folder and needed for a check.

    Its own faults are reported by the check of the model.

    Raises:
        RecipeError: There is no chat template of the name that the recipe gives.
    """
    # Of a template that is neither shipped nor a file, whether or not it is needed.
    template = None if recipe.model.chat_template is None else chat_template_text(recipe.model.chat_template)
    tasks = recipe.eval.tasks
    sources = [*recipe.data.sources, *(source for task in tasks for source in task.sources().values())]
    tried = any(source.path != STDLIB and (source.synthetic or is_local(str(source.path))) for source in sources)
    if not tried and all(task.sources() for task in tasks):
        return None
    name = recipe.model.tokenizer or recipe.model.path
    folder = model_folder(recipe.model.model_copy(update={"path": name}))
    if folder is None:
        check.unchecked.append(f"the tokenizer of {name}")
        return None
    # Not AutoTokenizer, which takes seconds to import torch.
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if template is not None:
            tokenizer.chat_template = template
        add_control_tokens(tokenizer, recipe.model.add_tokens)
        return tokenizer
    except BaseException as error:
        # Panics of a library written in Rust are not subclasses of Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        check.unchecked.append(f"the tokenizer in {folder} ({first_line(error)})")
        return None
    finally:
        logging.set_verbosity(said)


@contextmanager
def _collected(faults: list[str], name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        faults.append(f"{name}: {error}")
