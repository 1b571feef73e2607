"""Trains a recipe on two ranks once for each fault, and tells how each rank ended. Run as a script.

    python faulty_ranks.py [--timeout SECONDS] RECIPE FOLDER [FAULT ...]

The ranks are forked, so that imports are paid once; on CUDA, which does not survive that, each is an interpreter of its
own. A few faults, by default all of them, run at a time. Writes ``FOLDER/FAULT.json``: exit codes (negative: a signal),
the seconds from the fault to the end of each rank, and what each rank said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
from ports import free_port
from training.drafts import draw_nothing
from training.preloaded import PRELOADED

from sparsetrain.activity import activity
from sparsetrain.cli import main
from sparsetrain.data.loader import StepLoader
from sparsetrain.training.checkpoints import saver
from sparsetrain.training.distributed import build, engine
from sparsetrain.training.output import evaluations

RANKS = 2
FAULTY_STEP = 3
PATIENCE = 120.0
"""Seconds of ``deepspeed.timeout`` for faults that need no clock."""
WRITING = 5.0
"""Seconds that the part of a checkpoint takes where it is to be slow: longer than a stuck main thread is given."""
AT_ONCE = 4
LONGEST = 180.0
"""Seconds after which ranks that have not ended by themselves are killed."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=9.0, help="of faults that only a clock reveals")
    parser.add_argument("--rank", type=int, help="be this rank of the one fault, and nothing else")
    parser.add_argument("--port", type=int, default=0, help="where the ranks meet")
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("faults", nargs="*")
    return parser.parse_args(arguments)


def now(moment: Path) -> None:
    moment.write_text(str(time.monotonic()))


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def raise_it(error: BaseException) -> None:
    raise error


def in_data(rank: int, act: Callable[[], Any]) -> Callable[[Path], None]:
    """``act`` while the rank waits for the data of the step."""

    def arrange(moment: Path) -> None:
        step = StepLoader.__next__

        def faulty(loader: StepLoader) -> Any:
            if os.environ["RANK"] == str(rank) and activity.step == FAULTY_STEP:
                now(moment)
                act()
            return step(loader)

        StepLoader.__next__ = faulty  # type: ignore[method-assign]

    return arrange


def in_forward(rank: int, act: Callable[[], Any]) -> Callable[[Path], None]:
    """``act`` in the last layer of the model."""

    def arrange(moment: Path) -> None:
        initialize = build.initialize

        def faulty(*arguments: Any) -> Any:
            built = initialize(*arguments)

            def hook(*_: Any) -> None:
                if os.environ["RANK"] == str(rank) and activity.step == FAULTY_STEP:
                    now(moment)
                    act()

            built.module.model.model.layers[-1].register_forward_hook(hook)
            return built

        build.initialize = faulty

    return arrange


def slow_evaluation(moment: Path) -> None:
    """Rank 0 evaluates for longer than the timeout, with progress; rank 1 waits in a collective."""
    evaluate = evaluations.evaluate

    def slow(*arguments: Any, **settings: Any) -> Any:
        for done in range(40):
            if os.environ["RANK"] == "0":
                time.sleep(1.5 * parse().timeout / 40)
            settings["on_progress"](done, 40)
        return evaluate(*arguments, **settings)

    evaluations.evaluate = slow


def fails_while_saving(moment: Path) -> None:
    """Rank 1 fails while both ranks are still writing the checkpoint of the step before, and rank 0 waits for it."""
    write = saver.write_blocks

    def slow(*arguments: Any) -> Any:
        time.sleep(WRITING)
        return write(*arguments)

    saver.write_blocks = slow
    in_data(1, lambda: raise_it(RuntimeError("a broken thing")))(moment)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[Path], None]] = {
    "killed": in_forward(1, kill(signal.SIGKILL)),
    "first-killed": in_data(0, kill(signal.SIGKILL)),
    "stopped": in_data(0, kill(signal.SIGSTOP)),
    "hanging-data": in_data(1, sleep_for_ever),
    "hanging-forward": in_forward(0, sleep_for_ever),
    "raising": in_data(1, lambda: raise_it(RuntimeError("a broken\nthing"))),
    # More than any machine has: the allocator refuses for real.
    "out-of-memory": in_forward(1, lambda: torch.empty(1 << 50, dtype=torch.uint8)),
    "slow-evaluation": slow_evaluation,
    "raising-while-saving": fails_while_saving,
}


TIMED = ("stopped", "hanging-data", "hanging-forward", "slow-evaluation")


def start_rank(rank: int, fault: str, options: argparse.Namespace) -> int:
    """Start a rank and return its process id."""
    if torch.cuda.is_available():
        own = ["--rank", str(rank), "--port", str(options.port), "--timeout", str(options.timeout)]
        command = [sys.executable, __file__, *own, options.recipe, str(options.folder), fault]
        return os.spawnv(os.P_NOWAIT, sys.executable, command)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = be_rank(rank, fault, options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_rank(rank: int, fault: str, options: argparse.Namespace) -> int:
    """Train as this rank and return the exit code."""
    folder, recipe = options.folder, options.recipe
    log = os.open(folder / f"{fault}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    FAULTS[fault](folder / f"{fault}.moment")
    timeout = options.timeout if fault in TIMED else PATIENCE
    arguments = [f"deepspeed.timeout={timeout / 60}", "train.steps=4", "checkpoint.export=false"]
    if fault == "slow-evaluation":
        corpus = Path(recipe).parent / "corpus.jsonl"
        arguments += [
            "eval.every=2",
            f"eval.tasks.perplexity={{lengths: [64], tokens: 64, source: {{path: {corpus}}}}}",
        ]
    if fault == "raising-while-saving":
        arguments.append(f"checkpoint.every={FAULTY_STEP - 1}")
    return main(["run", recipe, *arguments, "--output", str(folder / fault)])


def cause(fault: str, options: argparse.Namespace) -> None:
    """Run the ranks through one fault and record their ends."""
    folder = options.folder
    options.port = free_port()
    running = {start_rank(rank, fault, options): rank for rank in range(RANKS)}
    codes: dict[int, int] = {}
    seconds: dict[int, float] = {}
    deadline = time.monotonic() + LONGEST
    moment = folder / f"{fault}.moment"
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = running.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            seconds[rank] = time.monotonic() - float(moment.read_text()) if moment.exists() else 0.0
        # A stopped process never ends by itself.
        if time.monotonic() > deadline or (len(running) == 1 and fault == "stopped"):
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    said = {rank: (folder / f"{fault}-{rank}.log").read_text() for rank in range(RANKS)}
    result = {"codes": codes, "seconds": seconds, "said": said}
    (folder / f"{fault}.json").write_text(json.dumps(result))


def cause_all(options: argparse.Namespace) -> None:
    """Run through the faults, a few at a time, each in a process that owns its ranks."""
    waiting = options.faults or list(FAULTS)
    running = 0
    while waiting or running:
        if waiting and running < AT_ONCE:
            name = waiting.pop()
            running += 1
            if os.fork() == 0:
                cause(name, options)
                os._exit(0)
        else:
            os.wait()
            running -= 1


def prepare() -> None:
    """Import what ranks need, and draw nothing, before they are forked."""
    engine._import_deepspeed()
    for module in PRELOADED:
        import_module(module)
    draw_nothing()


if __name__ == "__main__":
    prepare()
    given = parse()
    if given.rank is None:
        cause_all(given)
    else:
        sys.exit(be_rank(given.rank, given.faults[0], given))
