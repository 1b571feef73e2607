"""Train SparseK's scorers alone, beside a frozen model, and generate in a small cache. On a CPU.

    python examples/sparsek_scorers.py [KEY=VALUE ...]

The model's own weights stay as they are: the run trains a few thousand numbers, which decide what is remembered. The
recipes *-sparsek-scorer-* do the same for real models.
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

import sparsetrain
from sparsetrain.cli import main

RUN = "runs/scorers"

if __name__ == "__main__":
    alone = ["train.parameters=new_modules", "train.new_modules_lr=null", "train.lr=1e-2", f"output={RUN}"]
    if code := main(["run", "tiny-sparsek", *alone, *sys.argv[1:]]):
        sys.exit(code)
    model, tokenizer = sparsetrain.load(f"{RUN}/final"), AutoTokenizer.from_pretrained(f"{RUN}/final")
    prompt = tokenizer("def add(a, b):\n", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
