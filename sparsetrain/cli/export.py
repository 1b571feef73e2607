"""``sparsetrain export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.interrupt import interruptible


def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge LoRA adapters into the base, which gives an ordinary model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the base, if it has moved (with --merge).", show_default=False),
    ] = None,
) -> None:
    """Export the trained model of a run as a folder to publish, with a model card: recipe, versions and evaluation.

    \b
    Examples:
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-adapters
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-model --merge
      sparsetrain export runs/my-lora-run my-model --merge --base /models/Qwen3-8B
    """
    from sparsetrain.training.output.publish import publish

    with interruptible():
        card = publish(run_folder, out, merge=merge, base=base)
    print(f"{out}: read {card}, then load it with sparsetrain.load({str(out)!r})")
