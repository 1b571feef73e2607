"""A command as one rank of a launcher: what ``launch/train.py`` and ``launch/eval.py`` share."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from sparsetrain.cli.entry import main
from sparsetrain.errors import SparsetrainError
from sparsetrain.training.distributed.launcher import adopt_slurm, leave_group

EXIT_SECONDS = 60
"""What a failed process may still take to exit: the destructor of a broken process group may wait for ever."""


def run_rank(command: str, arguments: list[str]) -> int:
    """Run a command of ``sparsetrain`` as one rank and return its exit code; deepspeed's launcher adds
    ``--local_rank``."""
    try:
        adopt_slurm(os.environ)
    except SparsetrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return main([command, *(argument for argument in arguments if not argument.startswith("--local_rank"))])


def exit_rank(code: int) -> NoReturn:
    """End the process, and leave the group of ranks where all went well."""
    if code:
        signal.alarm(EXIT_SECONDS)
    else:
        leave_group()
    sys.exit(code)
