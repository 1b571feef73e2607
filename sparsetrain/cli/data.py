"""``sparsetrain data preview``: what a run reads, learns and leaves out."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from sparsetrain.cli.arguments import Overrides, RecipeArgument, print_notes
from sparsetrain.errors import DataError

app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _data() -> None:
    pass


@app.command()
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, max=1000, help="Training rows shown with what is learned of them.")] = 3,
    tokens: Annotated[
        int, typer.Option(min=0, help="Tokens shown of each row, half from its beginning; 0: all.")
    ] = 1000,
) -> None:
    """Show what a run would read, learn and leave out, without loading the model.

    Learned text is green on a terminal and stands between « and » elsewhere; control tokens are reversed.

    \b
    Examples:
      sparsetrain data preview my.yaml
      sparsetrain data preview my.yaml --rows 1 data.sources.0.path=chats.jsonl
      sparsetrain data preview quickstart 'data.sources=[{path: chats.jsonl}]'
    """
    from sparsetrain.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_notes(loaded)

    # These take seconds, and a mistake in the recipe is said before.
    from rich.console import Console

    from sparsetrain.cli.data_lines import places_of, print_mixture, print_row, print_source
    from sparsetrain.data import build_rows
    from sparsetrain.data.ending import remarks, turn_ending
    from sparsetrain.data.survey import survey
    from sparsetrain.data.values import fix_or_skip
    from sparsetrain.modeling.tokenizers import recipe_tokenizer

    with loaded.naming_places():
        settings, console = loaded.recipe, Console(highlight=False, soft_wrap=True)
        tokenizer = recipe_tokenizer(settings.model)
        pairs = settings.preference is not None
        sources = [each for each in settings.data.sources if each.path is not None]
        read = [survey(each, settings.data, tokenizer, pairs=pairs) for each in sources]
        for each in read:
            print_source(console, each, settings)
        by_label = {each.source.label: each for each in read}
        data = settings.data.model_copy(update={"on_malformed": "skip"})
        # What it warns of was said above.
        logger = logging.getLogger("sparsetrain.data")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            stream = build_rows(data, settings.sequence, tokenizer, settings.train.seed, pairs=pairs)
            print_mixture(console, stream, settings, by_label)
            shown = [next(stream) for _ in range(rows)]
            places = places_of(shown, by_label)
            for number, row in enumerate(shown, 1):
                print_row(console, number, row, places, tokenizer, tokens, pairs=pairs)
        finally:
            logger.setLevel(level)
        if stream.chat:
            for remark in remarks(turn_ending(tokenizer), tokenizer):
                print(f"note: {remark}", file=sys.stderr)
    unread = {each.source.label: sum(each.faults.values()) for each in read if each.faults}
    if unread and settings.data.on_malformed == "stop":
        counts = ", ".join(f"{count:,} of {label}" for label, count in unread.items())
        raise DataError(f"a run stops at rows that cannot be read: {counts}. {fix_or_skip('them')}")
