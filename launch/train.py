"""Train a recipe under a launcher, one process per GPU.

    deepspeed launch/train.py recipes/qwen3-8b-power-128k.yaml train.lr=2e-5
    deepspeed --num_gpus 2 launch/train.py quickstart --resume
    torchrun --nproc-per-node 8 launch/train.py my.yaml
    srun --ntasks-per-node 8 python launch/train.py my.yaml

The arguments are those of ``sparsetrain run``; deepspeed's launcher adds ``--local_rank``, which the environment says
too. Installed from a wheel, it is the module ``sparsetrain.launch.train`` (``torchrun -m``, ``deepspeed --module``).
"""

from __future__ import annotations

import sys

from sparsetrain.cli.rank import exit_rank, run_rank
from sparsetrain.training.supervision.signals import ExitOnSignal

if __name__ == "__main__":
    ends = ExitOnSignal()
    code = ends.code = run_rank("run", sys.argv[1:])
    exit_rank(code)
