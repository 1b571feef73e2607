"""Train a recipe under the deepspeed launcher, one process per GPU.

    deepspeed launch/train.py recipes/qwen3-8b-power-128k.yaml train.lr=2e-5
    deepspeed --num_gpus 2 launch/train.py quickstart --resume

The arguments are those of ``sparsetrain run``; the launcher adds ``--local_rank``, which the environment says too.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # The launcher puts this folder first on the path. Its neighbours must not be importable by accident.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from sparsetrain.cli import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["run", *arguments]))
