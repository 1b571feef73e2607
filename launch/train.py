"""Train a recipe under the deepspeed launcher, one process per GPU.

    deepspeed launch/train.py recipes/qwen3-8b-power-128k.yaml train.lr=2e-5
    deepspeed --num_gpus 2 launch/train.py quickstart --resume

The arguments are those of ``sparsetrain run``; the launcher adds ``--local_rank``, which the environment says too.
"""

from __future__ import annotations

import sys

from sparsetrain.cli import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["run", *arguments]))
