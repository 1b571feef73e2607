"""Evaluate a model under a launcher, one process per GPU, which share the samples.

    deepspeed launch/eval.py runs/power-32k --tasks ruler --output ruler.json
    torchrun --nproc-per-node 8 launch/eval.py runs/power-32k --tasks ruler --output ruler.json
    srun --ntasks-per-node 8 python launch/eval.py runs/power-32k --tasks ruler --output ruler.json

The arguments are those of ``sparsetrain eval``. Installed from a wheel, it is the module ``sparsetrain.launch.eval``
(``torchrun -m``, ``deepspeed --module``).
"""

from __future__ import annotations

import os
import signal
import sys

from sparsetrain.cli import main
from sparsetrain.errors import SparsetrainError
from sparsetrain.training.distributed.launcher import adopt_slurm, leave_group

EXIT_SECONDS = 60
"""What a failed process may still take to exit: the destructor of a broken process group may wait for ever."""


def launch(arguments: list[str]) -> int:
    """Run ``sparsetrain eval`` as one rank and return its exit code; deepspeed's launcher adds ``--local_rank``."""
    try:
        adopt_slurm(os.environ)
    except SparsetrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return main(["eval", *(argument for argument in arguments if not argument.startswith("--local_rank"))])


if __name__ == "__main__":
    code = launch(sys.argv[1:])
    if code:
        signal.alarm(EXIT_SECONDS)
    else:
        leave_group()
    sys.exit(code)
