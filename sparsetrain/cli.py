"""The ``sparsetrain`` command. Each subcommand imports what it needs: help is instant, and recipes need no torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sparsetrain import __version__
from sparsetrain.container import settle_in
from sparsetrain.errors import ModelError, RecipeError, SparsetrainError, first_line
from sparsetrain.streams import forgiving

if TYPE_CHECKING:
    from sparsetrain.recipe import LoadedRecipe

app = typer.Typer(
    name="sparsetrain",
    help="Finetune Hugging Face language models with sparse attention for long contexts.",
    epilog="Start with: sparsetrain run quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
recipes = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(recipes, name="recipe")
benchmarks = typer.Typer(
    help="Time the kernels beside the best implementations of others.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(benchmarks, name="bench")

MOST_GPUS = 2**17
"""GPUs that a batch or a plan is computed for."""

DISK_FAULTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "it was there before; see what removed it",
    errno.ENOTDIR: "see what took the place of a folder",
    errno.EISDIR: "see what made it a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the mount",
}
"""What the machine, not the program, is to blame for, and what helps."""

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings laid over the recipe, such as train.lr=2e-5.", show_default=False
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A :class:`SparsetrainError`, or a disk that is full, gone or not writable, becomes a message on stderr;
    ``SPARSETRAIN_TRACEBACK=1`` shows where it came from. Standard output that cannot be written is an error where it is
    what the command is for.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with forgiving() as streams:
        code = _answer(given)
        sys.stdout.flush()
        if code == 0 and streams.lost_output is not None and not _only_tells(given):
            print(f"error: standard output cannot be written: {_reason(streams.lost_output)}", file=sys.stderr)
            return SparsetrainError.exit_code
    return code


def _answer(arguments: list[str]) -> int:
    try:
        for note in settle_in(os.environ):
            if os.environ.get("RANK", "0") == "0":
                print(f"note: {note}", file=sys.stderr)
        for argument in arguments:
            if not argument.isprintable():
                _refuse_unprintable(argument)
        app(args=arguments, prog_name="sparsetrain")
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (SparsetrainError, OSError) as error:
        told = isinstance(error, SparsetrainError) or error.errno in DISK_FAULTS
        if not told or os.environ.get("SPARSETRAIN_TRACEBACK") == "1":
            raise
        rank = f" (rank {os.environ.get('RANK', '?')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        remedy = f"; {DISK_FAULTS[error.errno or 0]}, or work in another folder" if isinstance(error, OSError) else ""
        print(f"error{rank}: {error}{remedy}", file=sys.stderr)
        return getattr(error, "exit_code", SparsetrainError.exit_code)
    except BaseException as error:
        # A library written in Rust gave up on a file that it had taken, in the middle of anything.
        if type(error).__name__ != "PanicException" or os.environ.get("SPARSETRAIN_TRACEBACK") == "1":
            raise
        print(f"error: tokenizers or safetensors failed on what a file holds: {first_line(error)}", file=sys.stderr)
        return SparsetrainError.exit_code


def _only_tells(arguments: Sequence[str]) -> bool:
    """Whether what a command is for is on the disk, and standard output only tells of it."""
    writes = any(argument.partition("=")[0] == "--output" for argument in arguments)
    return arguments[:1] in (["run"], ["export"]) or arguments[:2] == ["recipe", "copy"] or writes


def _reason(fault: Exception) -> str:
    if isinstance(fault, UnicodeEncodeError):
        letters = fault.object[fault.start : fault.end]
        return f"its encoding, {fault.encoding}, has no {letters!a}; set PYTHONIOENCODING=utf-8"
    return str(fault)


def _refuse_unprintable(argument: str) -> None:
    """Bytes that are not UTF-8 arrive as characters that nothing can write again, a recipe or a log least of all."""
    from sparsetrain.recipe.yaml_source import text_fault

    fault = text_fault(argument)
    if fault is not None:
        raise RecipeError(f"the argument {argument!r:.200} {fault}")


def script() -> NoReturn:
    """The command as a process of its own."""
    from sparsetrain.training.signals import Ends

    # Other commands have nothing to be started again for.
    ends = Ends() if sys.argv[1:2] == ["run"] else None
    code = main()
    if ends is not None:
        ends.code = code
    # Stopped while it loaded its libraries, a run leaves them half loaded: they are not loaded again to end it.
    if code == 0 and (launched := sys.modules.get("sparsetrain.training.launched")) is not None:
        launched.part()
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sparsetrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint of the run folder.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Run folder; the same as the override output=FOLDER.", show_default=False)
    ] = None,
) -> None:
    """Train a recipe in this process.

    \b
    Examples:
      sparsetrain run quickstart
      sparsetrain run quickstart attention.method=sliding attention.block=32 --output runs/sliding
      sparsetrain run my.yaml train.lr=2e-5 eval.passkey.lengths=[4096,8192]
      sparsetrain run my.yaml --resume

    \b
    Several GPUs, one process each, through DeepSpeed's launcher:
      deepspeed launch/train.py my.yaml train.lr=2e-5

    A run stopped by SIGTERM or SIGUSR1 saves what it has and exits with 75: start it again with --resume.
    """
    from sparsetrain.training.signals import Outcome, Stopped, StopSignals

    outcome = Outcome.FINISHED
    with StopSignals() as signals:
        try:
            from sparsetrain.recipe import load_recipe

            loaded = load_recipe(recipe, overrides or [], output)
            from sparsetrain.training.belongings import refuse_early, run_folder

            refuse_early(run_folder(loaded.recipe), resume)
            if os.environ.get("RANK", "0") == "0":
                _print_notes(loaded)
                # Importing torch and DeepSpeed and reading the model take a while, silently.
                print(f"{loaded.recipe.name}: loading the libraries, the model and the data", flush=True)
            from sparsetrain.training.run import run as train

            with loaded.naming_places():
                outcome = train(loaded.recipe, resume=resume, signals=signals)
        except Stopped as stopped:
            outcome = stopped.outcome
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


@app.command(name="eval")
def evaluate_folder(
    folder: Annotated[Path, typer.Argument(help="A trained model: the final/ of a run folder.", show_default=False)],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a trained folder by the eval section of a recipe.

    The folder says which attention method it was trained with; the recipe says what is measured.

    \b
    Examples:
      sparsetrain eval runs/quickstart/final quickstart
      sparsetrain eval runs/quickstart/final quickstart eval.passkey.lengths=[4096] --output result.json
    """
    from sparsetrain.recipe import load_recipe

    for override in overrides or []:
        if not override.startswith(("eval.", "eval=", "train.seed=")):
            raise RecipeError(f"{override} has no effect here: the folder says what is evaluated, the recipe only how")
    loaded = load_recipe(recipe, overrides or [])
    section = loaded.recipe.eval
    if section.empty:
        raise RecipeError(f"{loaded.path} has nothing to measure: give eval.perplexity, eval.passkey or eval.recall")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{folder} holds no model (no config.json or adapter_config.json); give the final/ folder of a run"
        )
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise RecipeError(f"--output {output}: there is no such folder to write to; name a file in one that exists")
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from sparsetrain.evaluation import evaluate
    from sparsetrain.evaluation.report import print_results
    from sparsetrain.modeling import load
    from sparsetrain.modeling.tokenizers import load_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load(folder)
    model.to(device)
    tokenizer = load_tokenizer(folder, "FOLDER (its tokenizer)")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)
        result = evaluate(
            model,
            tokenizer,
            section,
            device=device,
            seed=loaded.recipe.train.seed,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_results({str(folder): result})
    if output is not None:
        output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


@app.command()
def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold LoRA adapters into the base: an ordinary model comes out.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the base, where it has moved (with --merge).", show_default=False),
    ] = None,
) -> None:
    """Write what a run trained as a folder to give away, with a model card: recipe, versions and evaluation.

    \b
    Examples:
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-adapters
      sparsetrain export runs/qwen3-8b-sparsek-lora-64k my-model --merge
      sparsetrain export runs/my-lora-run my-model --merge --base /models/Qwen3-8B
    """
    from sparsetrain.training.publish import publish

    card = publish(run_folder, out, merge=merge, base=base)
    print(f"{out}: read {card}, then load it with sparsetrain.load({str(out)!r})")


@app.command()
def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe file, or the name of a shipped recipe.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_GPUS, help="GPUs, one process each; one, or sequence.parallel of them.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200, b200, a100, a100-40gb, l40s or 4090.")] = "h100",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of one GPU, such as 80GB; by default the device's.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The model's config.json, where its shape is not known here.", show_default=False),
    ] = None,
    liger: Annotated[bool, typer.Option(help="liger-kernel is installed: what train.liger: auto means.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    all_recipes: Annotated[
        bool, typer.Option("--all", help="Every shipped recipe on the GPUs its comment names (with --markdown).")
    ] = False,
) -> None:
    """Estimate the memory and the time of a recipe before anything runs, and say what to change if it does not fit.

    Needs no GPU and no network, and torch only to look at a model of your own. Memory is counted by component and
    phase; time is for the recipe's attention and for dense attention in its place.

    \b
    Examples:
      sparsetrain plan qwen3-8b-power-128k --gpus 8
      sparsetrain plan my.yaml sequence.length=262144 --gpus 8 --device h200
      sparsetrain plan my.yaml --gpus 4 --memory 48GB --json
    """
    from sparsetrain.plan.command import run_plan

    run_plan(
        recipe,
        overrides or [],
        gpus=gpus,
        device=device,
        memory=memory,
        config=config,
        liger=liger,
        all_recipes=all_recipes,
        as_markdown=as_markdown,
        in_json=as_json,
    )


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="Also check this machine for the needs of a recipe.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: versions, stale locks, GPU and kernels, ports, disk, W&B login.

    Exits with code 2 if anything would stop a run.

    \b
    Examples:
      sparsetrain doctor
      sparsetrain doctor qwen3-8b-power-128k
    """
    from sparsetrain.doctor import diagnose
    from sparsetrain.recipe import load_recipe

    if recipe is None:
        raise typer.Exit(diagnose())
    loaded = load_recipe(recipe, overrides or [])
    raise typer.Exit(diagnose(loaded.recipe, loaded.naming_places))


@recipes.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with sparsetrain.

    \b
    Start from one of them:
      sparsetrain recipe copy quickstart my.yaml
    """
    from sparsetrain.recipe.describe import summary
    from sparsetrain.recipe.shipped import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, file in shipped.items():
        print(f"{name:{width}}  {summary(file)}".rstrip())


@recipes.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Put its description above every field.")] = False,
) -> None:
    """Print a recipe as a run would see it: bases merged, overrides applied, defaults filled in.

    \b
    Examples:
      sparsetrain recipe show quickstart
      sparsetrain recipe show quickstart train.lr=2e-5 --explain
    """
    from sparsetrain.recipe import dump_recipe, load_recipe
    from sparsetrain.recipe.describe import explained

    loaded = load_recipe(recipe, overrides or [])
    _print_notes(loaded)
    print(explained(loaded.recipe) if explain else dump_recipe(loaded.recipe), end="")


@recipes.command()
def copy(
    recipe: RecipeArgument,
    target: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder to copy to; by default here.")
    ] = None,
) -> None:
    """Copy a shipped recipe, comments included, to start your own. Never overwrites.

    \b
    Examples:
      sparsetrain recipe copy quickstart
      sparsetrain recipe copy qwen3-8b-power-128k my.yaml
    """
    from sparsetrain.recipe.shipped import find_recipe

    source = find_recipe(recipe)
    target = Path() if target is None else target
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError(f"{target} exists already; give another name: sparsetrain recipe copy {recipe} NAME.yaml")
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent} to copy to")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror}") from error
    print(f"copied to {target}; train it with: sparsetrain run {target}")


@recipes.command()
def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...", help="Recipes, and overrides for all of them.", show_default=False
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_GPUS,
            help="GPUs to resolve the batch for; one, or sequence.parallel of them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check recipes and the first row of their local data without loading a model, and print what follows from them.

    \b
    Examples:
      sparsetrain recipe validate my.yaml
      sparsetrain recipe validate recipes/*.yaml --ranks 8
      sparsetrain recipe validate my.yaml train.lr=2e-5
    """
    from sparsetrain.data.check import check_data
    from sparsetrain.recipe import load_recipe
    from sparsetrain.recipe.describe import attention_facts, batch_facts

    overrides = [argument for argument in arguments if "=" in argument and not os.path.isfile(argument)]
    names = [argument for argument in arguments if argument not in overrides]
    if not names:
        raise RecipeError("name at least one recipe to validate")
    failures = 0
    for name in names:
        try:
            loaded = load_recipe(name, overrides)
            gpus = ranks or loaded.recipe.sequence.parallel
            with loaded.naming_places():
                facts = f"{batch_facts(loaded.recipe, gpus)}; {attention_facts(loaded.recipe)}"
                _check_deepspeed(loaded, gpus)
                _check_model(loaded)
                data = check_data(loaded.recipe)
        except SparsetrainError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
        else:
            unseen = f"; not looked at: {', '.join(data.unseen)}" if data.unseen else ""
            print(f"{name}: valid: {facts}{unseen}")
            _print_notes(loaded)
            for line in data.shown:
                print(line)
            for remark in data.remarks:
                print(f"note: {remark}", file=sys.stderr)
    if failures:
        raise typer.Exit(RecipeError.exit_code)


@recipes.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for completion in editors.

    \b
    Save it, and put this first line into a recipe (VS Code, Neovim and JetBrains read it):
      sparsetrain recipe schema > recipe.schema.json
      # yaml-language-server: $schema=recipe.schema.json
    """
    from sparsetrain.recipe.describe import json_schema

    print(json.dumps(json_schema(), indent=2))


# Options that several benchmarks share.
QueryHeads = Annotated[
    int | None, typer.Option(min=1, help="Query heads; by default 32, and 4 without a GPU.", show_default=False)
]
KVHeads = Annotated[
    int | None, typer.Option(min=1, help="KV heads; by default 8, and 2 without a GPU.", show_default=False)
]
HeadDim = Annotated[int, typer.Option(min=1, help="Elements of a head.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32; by default bfloat16, and float32 without a GPU.", show_default=False
    ),
]
PatternBlock = Annotated[int, typer.Option(min=1, help="Tokens in a block of the pattern.")]
PatternWindow = Annotated[int, typer.Option(min=1, help="Nearest blocks, the query's own included.")]
PatternSinks = Annotated[int, typer.Option(min=0, help="First blocks, which every query reads.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences.")]
Budget = Annotated[float, typer.Option(min=1, help="Milliseconds to repeat each measurement for.")]
CheckGradients = Annotated[bool, typer.Option(help="First compare outputs and gradients; what fails is not ranked.")]
PictureFolder = Annotated[
    Path | None, typer.Option(help="Folder for the CSV, the JSON and the picture.", show_default=False)
]


@benchmarks.command()
def power(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens, commas between; by default 8192,32768,131072, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    block: PatternBlock = 256,
    window: PatternWindow = 5,
    sinks: PatternSinks = 1,
    batch: Sequences = 1,
    packed: Annotated[
        bool, typer.Option(help="Documents of log-normal lengths of mean 4096, packed into one sequence.")
    ] = False,
    opponents: Annotated[
        str,
        typer.Option(
            help="ours, ours-triton, flex, flex-flash, cudnn, fa2, fa4; packed: ours, ours-triton, flex, flex-flash,"
            " varlen; without a GPU: ours, sdpa. Commas between, or all."
        ),
    ] = "all",
    budget: Budget = 150,
    check: CheckGradients = True,
    output: PictureFolder = None,
) -> None:
    """Time PowerAttention's kernels beside FlexAttention with the same mask, and beside dense attention.

    What is not installed, or runs out of memory, is reported with the reason and stops nothing else.

    Without a GPU it times the plain PyTorch path on short lengths.

    \b
    Examples:
      sparsetrain bench power
      sparsetrain bench power --output bench
      sparsetrain bench power --packed --lengths 65536
      sparsetrain bench power --lengths 1048576 --heads 4 --kv-heads 1 --opponents ours,flex,cudnn
      sparsetrain bench power --opponents ours,flex --lengths 8192 --no-check --budget 500
    """
    from sparsetrain.bench.command import run_power

    run_power(
        output=output,
        lengths=lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block=block,
        window=window,
        sinks=sinks,
        batch=batch,
        packed=packed,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )


@benchmarks.command()
def sparsek(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens, commas between; by default 8192,32768,131072,524288, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    topk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Selected keys a row; by default 1024, with --crossover 512, and 128 without a GPU.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Last tokens, the query's own included; by default as topk.", show_default=False),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens, which every query reads.")] = 4,
    gate: Annotated[str, typer.Option(help="value (the paper's), log or straight.")] = "value",
    scores: Annotated[
        str,
        typer.Option(
            help="normal: 0.7 times standard normal, alike for all tokens, so that selected keys lie anywhere, the"
            " worst case; drift: newer tokens have larger ones."
        ),
    ] = "normal",
    batch: Sequences = 1,
    crossover: Annotated[
        bool,
        typer.Option(
            "--crossover",
            help="From which length on SparseK is faster than FA2: other defaults, topk and window of 512 and lengths"
            " of 1024 to 16384.",
        ),
    ] = False,
    opponents: Annotated[
        str | None,
        typer.Option(
            help="ours, cudnn, fa2, fa4; without a GPU: ours, sdpa. Commas between, or all, which is the default;"
            " with --crossover it is ours,fa2.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = 150,
    check: CheckGradients = True,
    output: PictureFolder = None,
) -> None:
    """Time SparseK in training, selection and attention with all gradients, beside dense attention.

    A dense call of more than about two seconds is measured once. What is not installed, or runs out of memory, is
    reported with the reason and stops nothing else.

    Without a GPU it times the plain PyTorch path on short lengths.

    \b
    Examples:
      sparsetrain bench sparsek
      sparsetrain bench sparsek --output bench
      sparsetrain bench sparsek --crossover
      sparsetrain bench sparsek --scores drift --gate log --lengths 131072
      sparsetrain bench sparsek --lengths 1048576 --heads 8 --kv-heads 2 --opponents ours,cudnn
    """
    from sparsetrain.bench.command import run_sparsek

    run_sparsek(
        output=output,
        lengths=lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        topk=topk,
        window=window,
        sinks=sinks,
        gate=gate,
        scores=scores,
        batch=batch,
        crossover=crossover,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )


@benchmarks.command()
def step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ways: Annotated[
        str,
        typer.Option(
            help="Commas between: recipe, dense (full attention instead), flex (the pattern by FlexAttention), bare "
            "(no attention: the limit), plain (a short SDPA script), hf and hf-bare (transformers, Liger, DeepSpeed)."
        ),
    ] = "recipe,dense,bare",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens in a row, commas between; by default the recipe's.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; one of more than 20 s is timed once.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the CSV and the JSON.", show_default=False)] = None,
) -> None:
    """Time the training step of a recipe, and its peak memory, beside other ways to take it.

    The model has the recipe's shape and random weights, so nothing is downloaded; rows are random tokens.

    \b
    Examples:
      sparsetrain bench step qwen3-8b-power-lora-64k --lengths 32768,131072 --ways plain,dense,flex,recipe,bare
      sparsetrain bench step my.yaml train.micro_batch=1 train.mlp_chunk=16384 --output bench

    \b
    Several GPUs:
      deepspeed --num_gpus 2 --no_local_rank --module sparsetrain.cli bench step my.yaml deepspeed.stage=3
    """
    from sparsetrain.bench.step import run_step

    run_step(recipe, overrides or [], ways=ways, lengths=lengths, repeats=repeats, output=output)


@benchmarks.command()
def decode(
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the caches, commas between; by default 8192,32768,131072, and 1024,4096 without a GPU.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences; by default 8, and 2 without a GPU.", show_default=False)
    ] = None,
    heads: QueryHeads = None,
    kv_heads: KVHeads = None,
    head_dim: HeadDim = 128,
    dtype: Dtype = None,
    block: PatternBlock = 256,
    window: PatternWindow = 5,
    sinks: PatternSinks = 1,
    topk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keys that SparseK selects, and of its window; by default 1024, and 128 without a GPU.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Caches read in turn, so that none is still in L2; by default 4, and 1 without a GPU.",
            show_default=False,
        ),
    ] = None,
    opponents: Annotated[
        str,
        typer.Option(
            help="ours, sparsek, flash, cudnn, efficient, math, varlen; without a GPU: ours, sparsek, sdpa. Commas"
            " between, or all."
        ),
    ] = "all",
    budget: Budget = 150,
    check: Annotated[bool, typer.Option(help="First compare outputs; what fails is not ranked.")] = True,
    output: PictureFolder = None,
) -> None:
    """Time a decoding step of PowerAttention and of SparseK beside attention over the whole cache.

    One new token a sequence, as a CUDA graph. Beside each time stands the floor: the bytes that the method must read
    at the bandwidth of a copy.

    Without a GPU it times the plain PyTorch path on short caches.

    \b
    Examples:
      sparsetrain bench decode
      sparsetrain bench decode --output bench
      sparsetrain bench decode --lengths 1048576 --batch 1 --layers 1 --opponents ours,flash
    """
    from sparsetrain.bench.decode_command import run_decode

    run_decode(
        output=output,
        lengths=lengths,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block=block,
        window=window,
        sinks=sinks,
        topk=topk,
        layers=layers,
        opponents=opponents,
        budget_ms=budget,
        check=check,
    )


def _check_deepspeed(loaded: LoadedRecipe, ranks: int) -> None:
    """Refuse a DeepSpeed JSON that contradicts the recipe, or that DeepSpeed refuses."""
    from sparsetrain.recipe.batch import plan_batch
    from sparsetrain.training.deepspeed_config import deepspeed_config

    config = deepspeed_config(loaded.recipe, plan_batch(loaded.recipe, ranks, rows_per_epoch=1))
    if loaded.recipe.deepspeed.config:
        from sparsetrain.training.engine import check_config

        check_config(config)


def _check_model(loaded: LoadedRecipe) -> None:
    """Refuse a model of the user's own that could not be built. That takes torch, so others are left to the run."""
    from sparsetrain.recipe.local_model import is_own

    if is_own(loaded.recipe):
        from sparsetrain.training.ready import check_model

        check_model(loaded.recipe)


def _print_notes(loaded: LoadedRecipe) -> None:
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    script()
