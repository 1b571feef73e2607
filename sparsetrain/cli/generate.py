"""``sparsetrain generate``: continue prompts with a trained model."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

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
from sparsetrain.cli.generate_notes import kept_keys, note_decode, note_model, speed
from sparsetrain.cli.interrupt import interruptible
from sparsetrain.counted import counted
from sparsetrain.errors import ModelError
from sparsetrain.streams import reader_gone

if TYPE_CHECKING:
    from sparsetrain.inference.prompts import Prompt
    from sparsetrain.inference.writer import Writer


@with_decode_options
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; may be given again.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A text to continue, or a .jsonl with prompt or messages in every line; - is standard input.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write each prompt as a user's message, by the chat template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A new .jsonl of rows with their completions; by default they are printed.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write after a prompt.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that are read together, padded on the left.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Divides the logits before a token is drawn; 0 takes the likeliest. By default as the model's "
            "generation_config.json says.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the likeliest tokens that together have this probability, such as 0.9.", show_default=False
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from tokens with at least this share of the likeliest token's probability.", show_default=False
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens that were there before become less likely.", show_default=False),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the random numbers by which tokens are drawn.")
    ] = 0,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="auto|TOKENS",
            help="Room of each layer for tokens of a row. auto, the default: what its pattern reads again of a text of "
            "this length. TOKENS: at most so many; a prompt that needs more is refused.",
            show_default=False,
        ),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Keep in host memory what a block pattern does not read now or next."),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    decode: dict[str, Any] | None = None,
) -> None:
    """Continue prompts with a trained model, by the attention method it was trained with.

    One prompt is printed as it is written; several, and rows of a .jsonl, as JSON Lines, or they go to --output.
    At the end, standard error says how fast it was and how much memory the cache took.

    \b
    Examples:
      sparsetrain generate runs/quickstart --prompt "def main():"
      sparsetrain generate sparsetrain:tiny --prompt "import " --max-new-tokens 20 --temperature 0.8
      sparsetrain generate my-model --file questions.jsonl --batch 8 --output answers.jsonl
      sparsetrain generate my-model --file long.txt --decode twilight
      sparsetrain generate my-model --file long.txt --decode.prune.p 0.9 --decode.refresh.every 8
      sparsetrain generate my-model --file book.txt --max-new-tokens 4096 --offload
    """
    from sparsetrain.generation.setting_text import parse_budget
    from sparsetrain.generation.settings import parse_decode
    from sparsetrain.inference.prompts import TABLE_SUFFIXES, has_rows, read_prompts

    check_first(model, dtype, device)
    section = parse_decode(decode) if decode else None
    parse_budget(budget or "auto")
    if output is not None:
        check_new("output", output, "file")
    sampling = _sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    prompts = read_prompts(prompt or [], file)
    if file is not None and file.suffix.lower() in TABLE_SUFFIXES:
        print(f"note: --file {file} is continued as one text; rows are read from a .jsonl", file=sys.stderr)

    import torch

    from sparsetrain.inference.fewer_kernels import ready_for_steps
    from sparsetrain.inference.models import check_room, find_model
    from sparsetrain.inference.sampling import check_own
    from sparsetrain.inference.writer import Writer
    from sparsetrain.modeling import set_decode

    kind, place = choose_dtype(dtype), choose_device(device)
    source = find_model(model)
    # Without weights, so that what is wrong is said before they are read.
    outline: Any = source.outline
    if decode is not None:
        set_decode(outline, section)
    own = outline.generation_config
    check_own(own, batch=min(batch, len(prompts)))
    arguments = sampling.arguments(own)
    encoded = [each.encode(source.tokenizer, chat=chat) for each in prompts]
    for each, tokens in zip(prompts, encoded, strict=True):
        check_room(outline, each.place, len(tokens), max_new_tokens)
    limits = _limits(outline, list(map(len, encoded)), batch, max_new_tokens, budget=budget, offload=offload)

    loaded = source.load(kind)
    if decode is not None:
        set_decode(loaded, section)
    note_model(loaded, source.tokenizer, prompts, sampling.describe(own), chat=chat)
    note_decode(loaded, max(map(len, encoded)), max_new_tokens)
    torch.manual_seed(seed)
    loaded = loaded.to(place)
    if (told := ready_for_steps(loaded)) is not None:
        print(f"note: {told}", file=sys.stderr)
    writer = Writer(loaded, source.tokenizer, max_new_tokens, arguments, limits)
    rows_asked = output is not None or (file is not None and has_rows(file))
    with interruptible():
        if len(prompts) == 1 and not rows_asked:
            _stream(writer, encoded[0])
        else:
            _write_rows(writer, prompts, encoded, batch, output)
    print(speed(writer.usage), file=sys.stderr)
    if (told := kept_keys(writer.usage)) is not None:
        print(told, file=sys.stderr)


def _sampling(**options: float | None) -> Any:
    from pydantic import ValidationError

    from sparsetrain.inference.sampling import Sampling

    try:
        return Sampling.model_validate(options)
    except ValidationError as error:
        fault = error.errors()[0]
        flag = str(fault["loc"][0]).replace("_", "-")
        raise ModelError(f"--{flag} {fault['input']}: {fault['msg'].lower()}") from error


def _limits(
    outline: Any, lengths: list[int], batch: int, max_new_tokens: int, *, budget: str | None, offload: bool
) -> dict[str, Any] | None:
    """The limits of a cache, which those of all batches keep; None, with a note, for caches that grow.

    Args:
        lengths: tokens of each prompt.

    Raises:
        ModelError: a limit was asked for, and cannot be kept.
    """
    from sparsetrain.inference.cached import make_cache

    limits = {"budget": budget or "auto", "offload": offload}
    try:
        for rows in {tuple(lengths[start : start + batch]) for start in range(0, len(lengths), batch)}:
            make_cache(outline, max(rows) + max_new_tokens, limits).check_prompts(rows)
    except ModelError as error:
        if budget is not None or offload:
            raise
        # Nothing was asked for: such a model generates in caches that grow.
        reason = str(error).partition("; ")[0]
        print(f"note: the cache grows with the text, and steps are slower: {reason}", file=sys.stderr)
        return None
    return limits


def _stream(writer: Writer, tokens: list[int]) -> None:
    from transformers import TextStreamer

    if (writer.model.generation_config.num_beams or 1) > 1:
        # Which beam is best is known at the end.
        print(writer.complete([tokens])[0].completion)
        return
    streamer = TextStreamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writer.complete([tokens], streamer=streamer, enough=reader_gone)


def _write_rows(
    writer: Writer, prompts: list[Prompt], encoded: list[list[int]], batch: int, output: Path | None
) -> None:
    """One JSON object a prompt, in order, written after each batch. What is written stays when it is interrupted."""
    from rich.console import Console
    from rich.progress import Progress

    from sparsetrain.inference.prompts import ANSWER

    written = 0
    with ExitStack() as stack:
        file: TextIO = stack.enter_context(
            nullcontext(sys.stdout) if output is None else output.open("x", encoding="utf-8")
        )
        if output is not None:
            # Without a row it would only be in the way of the next call.
            stack.callback(lambda: None if written else output.unlink())
            of = f" of {len(prompts)}" if len(prompts) > 1 else ""
            stack.callback(lambda: print(f"{output}: {counted(written, 'completion')}{of}", file=sys.stderr))
        bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = bar.add_task("tokens", total=len(prompts) * writer.max_new_tokens)
        for start in range(0, len(prompts), batch):
            part = encoded[start : start + batch]
            done = writer.complete(part, on_token=partial(bar.advance, task, len(part)))
            for prompt, completion in zip(prompts[start : start + batch], done, strict=True):
                row = prompt.row | {name: getattr(completion, name) for name in ANSWER}
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
                written += 1
            if output is None and reader_gone():
                break
            bar.update(task, completed=min(start + batch, len(prompts)) * writer.max_new_tokens)
