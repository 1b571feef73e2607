"""Continue a model on books, or any long texts, at four times its context, on a CPU.

    python examples/books.py 'books/*.txt' [KEY=VALUE ...]
    python examples/books.py                # the documentation of this repository is the book

Each file is a document. A twentieth of them is held out for the perplexity. For a real model give its Hub id and a GPU:
model.path=Qwen/Qwen3-0.6B model.dtype=bfloat16 sequence.length=32768
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sparsetrain.cli import main

DOCS = Path(__file__).resolve().parents[1] / "docs/*.md"

if __name__ == "__main__":
    given = sys.argv[1:]
    books = given.pop(0) if given and "=" not in given[0] and not given[0].startswith("-") else str(DOCS)
    source = {"path": books, "validation": 0.05}
    measured = {"task": "perplexity", "lengths": [512, 2048], "tokens": 4096}
    recipe = {
        "data.sources": [source],
        "eval.tasks": [{**measured, "source": {**source, "split": "validation"}}],
        "output": "runs/books",
    }
    settings = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
    sys.exit(main(["run", "quickstart", *settings, *given]))
