"""``sparsetrain calibrate``: find Twilight's p for each layer, on held-out text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsetrain.cli.arguments import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    check_first,
    check_new,
    choose_device,
    choose_dtype,
)
from sparsetrain.cli.decode_options import with_decode_options
from sparsetrain.counted import counted
from sparsetrain.errors import DataError, ModelError
from sparsetrain.textfile import check_readable

if TYPE_CHECKING:
    from rich.table import Table

    from sparsetrain.generation.settings import Decode
    from sparsetrain.inference.calibrate import Layer

NOT_MEASURED = (
    "calibrated",
    "heavy_channels",
    "prune.p",
    "refresh.every",
    "refresh.similarity",
    "refresh.keep",
    "refresh.staggered",
)


@partial(with_decode_options, without=NOT_MEASURED)
def calibrate(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Option(help="Held-out text: a .jsonl with text in every line, or one text.", show_default=False)
    ],
    error: Annotated[
        float, typer.Option(min=0, max=1, help="What a layer's output may lose in the mean, as a share of its norm.")
    ] = 0.05,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Tokens of each text that is read; by default 4,096, or what model and data have.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows that are measured in each layer; by default 64, or all there are.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random choice of rows.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the decode section to this new .yaml or .json file.", show_default=False),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Save the model with the section to this new folder.", show_default=False),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    decode: dict[str, Any] | None = None,
) -> None:
    """Find Twilight's p for each layer from what its attention output may lose, on held-out text.

    In the second halves of up to eight texts, rows (tokens) are drawn and read as if each were a step of generation. Of
    14 values of p from 0.5 to 1 the smallest is taken whose mean error is at most --error; a layer in which none is
    reads all keys. For that p the table shows the mean error, that of the worst row and head, and how many keys are
    read of how many. It also shows which share of the softmax weight these and the candidates hold. With
    --decode.select channels it finds the channels too.

    Without --output or --save only the table is made.

    \b
    Examples:
      sparsetrain calibrate my-model --data book.txt --error 0.05 --output decode.yaml
      sparsetrain generate my-model --file long.txt --decode decode.yaml
      sparsetrain calibrate my-model --data held-out.jsonl --tokens 32768 --decode.select quest --output decode.yaml
      sparsetrain calibrate my-model --data book.txt --decode.select channels --output decode.yaml
      sparsetrain calibrate my-model --data book.txt --save my-faster-model
    """
    from sparsetrain.generation.settings import parse_decode

    given = decode or {}
    if given.get("refresh") is not None:
        raise ModelError("--decode: refresh is not measured; calibrate without it, and add it to what comes out")
    section = parse_decode({**given, "prune": {**(given.get("prune") or {}), "p": 1.0}})
    _check_new(output, save)
    check_first(model, dtype, device)
    check_readable(data, f"--data {data}", DataError)

    from rich.console import Console
    from rich.progress import Progress

    from sparsetrain.durable import write_whole
    from sparsetrain.inference.calibrate import calibrate as find
    from sparsetrain.inference.calibrate import sample
    from sparsetrain.inference.heldout import stretches
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import save as save_model
    from sparsetrain.modeling import set_decode
    from sparsetrain.modeling.positions import position_limit
    from sparsetrain.recipe.decode_file import decode_text
    from sparsetrain.tables import print_tables

    kind, place = choose_dtype(dtype), choose_device(device)
    source = find_model(model)
    if save is not None and source.has_adapters:
        raise ModelError(
            f"--save {save}: {model} holds adapters, which are not saved with their base; use --output, or export the "
            "run with --merge first"
        )
    texts = stretches(data, source.tokenizer, tokens, position_limit(source.outline))
    # Both are done again with the weights: here they refuse before those are read.
    set_decode(source.outline, section)
    sample(section, len(texts), len(texts[0]), rows, seed)
    loaded = source.load(kind)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("texts", total=len(texts))
        found, layers = find(
            loaded.to(place),
            texts,
            section,
            error=error,
            rows=rows,
            seed=seed,
            name=model,
            data=str(data),
            on_text=partial(bar.advance, task),
        )
    print_tables(Console(), _table(layers))
    for line in _told(layers, found, len(texts)):
        print(line, file=sys.stderr)
    if output is not None:
        write_whole(output, decode_text(found) if output.suffix != ".json" else found.model_dump_json(indent=2) + "\n")
        print(f"{output}: use it with sparsetrain generate --decode {output}", file=sys.stderr)
    if output is None and save is None:
        print("nothing is written: give --output decode.yaml, or --save for a folder with the model", file=sys.stderr)
    if save is not None:
        save_model(set_decode(loaded, found), save, source.tokenizer)
        print(f"{save}: load it with sparsetrain.load({str(save)!r})", file=sys.stderr)


def _check_new(output: Path | None, save: Path | None) -> None:
    for flag, path, kind in (("output", output, "file"), ("save", save, "folder")):
        if path is not None:
            check_new(flag, path, kind)
    if output is not None and output.suffix not in (".yaml", ".yml", ".json"):
        raise DataError(f"--output {output} must end in .yaml, .yml or .json, by which --decode knows it for a file")
    if output is not None and save is not None and os.path.abspath(output) == os.path.abspath(save):
        raise DataError(f"--output and --save are both {output}: one is a file and one a folder; name two")


def _told(layers: list[Layer], found: Decode, texts: int) -> Iterator[str]:
    """What the table is of, and what it does not show."""
    record = found.calibrated
    assert record is not None
    yield f"{counted(record.rows, 'row')} of {counted(texts, 'text')} of {record.tokens:,} tokens"
    yield "error: |o - o_kept| / |o| of the output of a layer's attention, its mean and its worst row and head"
    dense = [str(layer.index) for layer in layers if layer.p is None]
    if dense:
        yield (
            f"all keys: layers ({', '.join(dense)}) that lose more than --error {record.error:g} even with p=1, which "
            "their rows show; the section has them in dense_layers"
        )
    candidates = found.candidate_tokens(record.tokens)
    if found.select != "full" and candidates >= record.tokens:
        yield (
            f"note: these texts are no longer than candidates={candidates:,}, so select={found.select} passed on every "
            "key, and what it leaves out of longer texts was not measured; raise --tokens, or lower --decode.candidates"
        )


def _table(layers: list[Layer]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for name in ("layer", "p", "error", "worst", "kept keys", "of", "softmax weight", "of candidates"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(
            str(layer.index),
            "all keys" if layer.p is None else f"{layer.p:g}",
            f"{layer.error:.2g}",
            f"{layer.worst:.2g}",
            f"{layer.kept:,.0f}",
            f"{layer.keys:,.0f}",
            f"{layer.mass:.2%}",
            f"{layer.candidate_mass:.2%}",
        )
    return table
