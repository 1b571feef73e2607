"""The entry point of the command line: commands, error messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, NoReturn

import typer

from sparsetrain.cli import bench, data, recipe
from sparsetrain.cli.calibrate import calibrate
from sparsetrain.cli.compare_decode import compare_decode
from sparsetrain.cli.doctor import doctor
from sparsetrain.cli.eval import NamesTasks, evaluate_model
from sparsetrain.cli.export import export
from sparsetrain.cli.flow import flow
from sparsetrain.cli.foreign_warnings import leave_out_needless
from sparsetrain.cli.generate import generate
from sparsetrain.cli.other_words import other_command
from sparsetrain.cli.plan import plan
from sparsetrain.cli.report import compare, report
from sparsetrain.cli.run import run
from sparsetrain.cli.runs import logs, runs
from sparsetrain.container import prepare_environment
from sparsetrain.errors import RecipeError, SparsetrainError, first_line
from sparsetrain.rank_variables import check_numbers
from sparsetrain.streams import forgiving
from sparsetrain.version import __version__

DISK_FAULTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "find out what removed it, or why nothing can be made there",
    errno.ENOTDIR: "find out what replaced the folder",
    errno.EISDIR: "find out what made it a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the mount",
}
"""Errors caused by the machine, not by the program, with fixes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A :class:`SparsetrainError`, or a disk that is full, missing or not writable, becomes a message on stderr;
    ``SPARSETRAIN_TRACEBACK=1`` shows the traceback. A failure to write standard output is an error if that is the
    purpose of the command.
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
    def command() -> None:
        leave_out_needless()
        for note in prepare_environment(os.environ):
            if os.environ.get("RANK", "0") == "0":
                print(f"note: {note}", file=sys.stderr)
        for argument in arguments:
            if not argument.isprintable():
                _refuse_unprintable(argument)
        check_numbers(os.environ)
        if arguments and (ours := other_command(arguments[0])) is not None:
            raise RecipeError(f"there is no command {arguments[0]}; this is `sparsetrain {ours}`")
        _command()(args=arguments, prog_name="sparsetrain")

    return _told(command)


def run_script(main: Callable[..., None]) -> NoReturn:
    """Run the function of a script of its own as a command, and end the process: errors are told as those of
    ``sparsetrain``."""
    sys.exit(_told(partial(typer.run, main)))


def _told(command: Callable[[], Any]) -> int:
    """The exit code of a command, whose errors are printed."""
    try:
        command()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (SparsetrainError, OSError) as error:
        expected = isinstance(error, SparsetrainError) or error.errno in DISK_FAULTS
        if not expected or os.environ.get("SPARSETRAIN_TRACEBACK") == "1":
            raise
        number = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
        rank = f" (rank {number})" if number else ""
        remedy = f"; {DISK_FAULTS[error.errno or 0]}, or work in another folder" if isinstance(error, OSError) else ""
        print(f"error{rank}: {error}{remedy}", file=sys.stderr)
        return getattr(error, "exit_code", SparsetrainError.exit_code)
    except BaseException as error:
        # A library written in Rust panicked on a file that it had accepted before.
        if type(error).__name__ != "PanicException" or os.environ.get("SPARSETRAIN_TRACEBACK") == "1":
            raise
        print(f"error: tokenizers or safetensors failed on the content of a file: {first_line(error)}", file=sys.stderr)
        return SparsetrainError.exit_code


@cache  # A process may run several commands.
def _command() -> Any:
    return typer.main.get_command(app)


def _only_tells(arguments: Sequence[str]) -> bool:
    """Whether the result of a command is on the disk, and standard output only reports it."""
    writes = any(argument.partition("=")[0] == "--output" for argument in arguments)
    return arguments[:1] in (["run"], ["export"]) or arguments[:2] == ["recipe", "copy"] or writes


def _reason(fault: Exception) -> str:
    if isinstance(fault, UnicodeEncodeError):
        letters = fault.object[fault.start : fault.end]
        return f"its encoding, {fault.encoding}, has no {letters!a}; set PYTHONIOENCODING=utf-8"
    return str(fault)


def _refuse_unprintable(argument: str) -> None:
    """Refuse arguments that are not UTF-8: Python maps their bytes to characters that cannot be written to a file."""
    from sparsetrain.recipe.yaml_source import text_fault

    fault = text_fault(argument)
    if fault is not None:
        raise RecipeError(f"the argument {argument!r:.200} {fault}")


def run_as_process() -> NoReturn:
    """Run the command of this process and end it; a run has handlers for stop signals from its start to its end."""
    from sparsetrain.training.supervision.signals import ExitOnSignal

    # Other commands need not be started again.
    ends = ExitOnSignal() if sys.argv[1:2] == ["run"] else None
    code = main()
    if ends is not None:
        ends.code = code
    # A run that is stopped while it imports libraries leaves them partially imported; do not import them again.
    if code == 0 and (launcher := sys.modules.get("sparsetrain.training.distributed.launcher")) is not None:
        launcher.leave_group()
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sparsetrain {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app = typer.Typer(
    name="sparsetrain",
    help="Finetune Hugging Face language models with sparse attention for long contexts.",
    epilog="Start with: sparsetrain run quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.callback()(_root)
app.command()(run)
app.command(name="eval", cls=NamesTasks)(evaluate_model)
app.command()(generate)
app.command()(calibrate)
app.command()(compare_decode)
app.command()(runs)
app.command()(logs)
app.command()(report)
app.command()(compare)
app.command()(export)
app.command()(plan)
app.command()(doctor)
for each in (app, recipe.app, data.app):
    flow(each)
app.add_typer(recipe.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
