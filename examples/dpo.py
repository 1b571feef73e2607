"""Learn which of two answers is preferred: DPO with sparse attention, on a CPU.

    python examples/dpo.py [KEY=VALUE ...]

Writes pairs.jsonl, in which the preferred answer is how a file of Python's library goes on and the rejected one how
another file does, and trains the embedded model on them with the recipe tiny-dpo. Settings go to the recipe, such as
preference.loss=simpo or output=runs/other. Your own pairs take the place of the file.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from pathlib import Path

from sparsetrain.cli import main

PAIRS, CHARACTERS = 200, 120


def make_pairs(path: Path) -> None:
    """Write rows of ``prompt``, ``chosen`` and ``rejected``."""
    rng = random.Random(0)
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for file in library if len(text := file.read_text("utf-8", "ignore")) > 10 * CHARACTERS]

    def cut() -> tuple[str, str]:
        text = rng.choice(texts)
        start = rng.randrange(len(text) - 2 * CHARACTERS)
        return text[start : start + CHARACTERS], text[start + CHARACTERS : start + 2 * CHARACTERS]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(PAIRS):
            (prompt, chosen), (_, rejected) = cut(), cut()
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


if __name__ == "__main__":
    if not Path("pairs.jsonl").exists():
        make_pairs(Path("pairs.jsonl"))
    sys.exit(main(["run", "tiny-dpo", *sys.argv[1:]]))
