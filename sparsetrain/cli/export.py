"""``sparsetrain export``: write a run's model as a folder to publish, and push it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.arguments import DTYPES
from sparsetrain.cli.completion import complete_run
from sparsetrain.cli.interrupt import interruptible
from sparsetrain.errors import CheckpointError

LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
"""The page that lists the identifiers, of which no library holds a list."""


def export(
    run_folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of a finished run.", show_default=False, autocompletion=complete_run
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge LoRA adapters into the base, which gives an ordinary model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the adapters' base, to merge into or to record.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of the weights: {', '.join(DTYPES[1:])}; by default as trained.", show_default=False),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="Its identifier on the Hub, such as apache-2.0; by default the base's, where that is known.",
            show_default=False,
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Then push the folder to the Hub, private.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: everybody may see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: write OUT and list what would be sent; no network.")
    ] = False,
) -> None:
    """Export the trained model of a run as a folder to publish, with a model card: license, base, data, evaluation,
    recipe, and no folder of this machine.

    A push makes a repository, or fills an empty one. Nothing is written to GGUF: llama.cpp has no sparse attention.

    \b
    Examples:
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-adapters
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-model --merge --dtype bfloat16
      sparsetrain export runs/my-lora-run my-model --merge --base /models/Qwen3-8B
      sparsetrain export runs/my my-model --push my-org/my-model --dry-run
    """
    if dtype is not None and dtype not in DTYPES[1:]:
        raise CheckpointError(f"--dtype {dtype} is not known; choose one of {', '.join(DTYPES[1:])}")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise CheckpointError(f"--license {license!r:.80} is no identifier of the Hub, such as apache-2.0 or other")
    for flag, given in (("--public", public), ("--dry-run", dry_run)):
        if given and push is None:
            raise CheckpointError(f"{flag} has no effect without --push ORG/NAME; give it, or leave {flag} out")

    from sparsetrain.training.output.folder_contents import check_finished

    # Without torch, which the others import.
    check_finished(run_folder, out)

    from sparsetrain.training.output.hub_folder import check_name, listing, open_repository, upload
    from sparsetrain.training.output.model_card import license_of
    from sparsetrain.training.output.publish import Export, check_export, publish

    asked = Export(merge, base, dtype, license, push)
    if push is not None:
        check_name(push)
    recipe = check_export(run_folder, out, asked)
    if license is None and license_of(base or recipe.model.path) is None:
        print("note: the card names no license, as none of the base is known here; give --license", file=sys.stderr)
    with interruptible():
        if push is not None and not dry_run:
            open_repository(push, public=public)
        card = publish(run_folder, out, asked)
        print(f"{out}: read {card}, then load it with sparsetrain.load({str(out)!r})")
        if push is not None and dry_run:
            _tell_what_would_be_sent(push, out, listing(out), license, public=public)
        elif push is not None:
            print(f"{upload(out, push)} ({_seen(public)})")


def _seen(public: bool) -> str:
    return "public" if public else "private"


def _tell_what_would_be_sent(push: str, out: Path, files: Iterable[str], license: str | None, *, public: bool) -> None:
    print(f"would make {push} ({_seen(public)}) and send:", *files, sep="\n")
    if license is not None:
        print(f"the Hub alone knows its identifiers of licenses, and judges {license} when it is sent: {LICENSES}")
    print(f"send it as it is: hf upload {push} {out} .{'' if public else ' --private'}")
