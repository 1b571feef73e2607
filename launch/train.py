"""Train a recipe under a launcher, one process per GPU.

    deepspeed launch/train.py recipes/qwen3-8b-power-128k.yaml train.lr=2e-5
    deepspeed --num_gpus 2 launch/train.py quickstart --resume
    torchrun --nproc-per-node 8 launch/train.py my.yaml
    srun --ntasks-per-node 8 python launch/train.py my.yaml

The arguments are those of ``sparsetrain run``; deepspeed's launcher adds ``--local_rank``, which the environment says
too. Installed from a wheel, it is the module ``sparsetrain.launch.train`` (``torchrun -m``, ``deepspeed --module``).
"""

from __future__ import annotations

import os
import signal
import sys

from sparsetrain.cli import main
from sparsetrain.errors import SparsetrainError
from sparsetrain.training.distributed.launcher import adopt_slurm, leave_group
from sparsetrain.training.supervision.signals import ExitOnSignal

EXIT_SECONDS = 60
"""What a failed process may still take to exit: the destructor of a broken process group may wait for ever."""


def launch(arguments: list[str]) -> int:
    """Run ``sparsetrain run`` as one rank and return its exit code."""
    try:
        adopt_slurm(os.environ)
    except SparsetrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return main(["run", *(argument for argument in arguments if not argument.startswith("--local_rank"))])


if __name__ == "__main__":
    ends = ExitOnSignal()
    code = ends.code = launch(sys.argv[1:])
    if code:
        signal.alarm(EXIT_SECONDS)
    else:
        leave_group()
    sys.exit(code)
