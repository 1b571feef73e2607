"""Evaluate a model under a launcher, one process per GPU, which share the samples.

    deepspeed launch/eval.py runs/power-32k --tasks ruler --output ruler.json
    torchrun --nproc-per-node 8 launch/eval.py runs/power-32k --tasks ruler --output ruler.json
    srun --ntasks-per-node 8 python launch/eval.py runs/power-32k --tasks ruler --output ruler.json

The arguments are those of ``sparsetrain eval``. Installed from a wheel, it is the module ``sparsetrain.launch.eval``
(``torchrun -m``, ``deepspeed --module``).
"""

from __future__ import annotations

import sys

from sparsetrain.cli.rank import exit_rank, run_rank

if __name__ == "__main__":
    exit_rank(run_rank("eval", sys.argv[1:]))
