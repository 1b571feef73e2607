"""Pass keys among distractors as prompts and completions: a completion is the question with its answer.

    python -m sparsetrain.recipes.evidence.needle_questions runs/evidence/needle-questions.jsonl

With ``attention.method: recycled`` the tokens of a question are then steps, and a choice may be older than the
question. The documents are those of the synthetic task of needles-base.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.entry import run_script

LENGTHS = (384, 448, 500)
"""Tokens of a document, which leave room for the end of the text in rows of 512."""


def write(file: Path, documents: int) -> None:
    """Write documents, the same every time."""
    from sparsetrain.data.synthetic import multikey_prompt
    from sparsetrain.modeling.places import resolve
    from sparsetrain.modeling.tokenizers import load_tokenizer
    from sparsetrain.randomness import generator

    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for number in range(documents):
            rng = generator(0, "needle questions", number)
            length = int(rng.choice(LENGTHS))
            drawn = multikey_prompt(tokenizer, length, rng.random(), rng, digits=5, keys=4, distractors=8)
            prompt, line, question = str(tokenizer.decode(drawn.input_ids, skip_special_tokens=True)).rpartition("\n")
            out.write(json.dumps({"prompt": prompt + line, "completion": question}) + "\n")


def main(
    file: Annotated[Path, typer.Argument(help="A .jsonl that is written.")],
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 1000,
) -> None:
    """Write prompts that hide pass keys, and questions with their answers."""
    if file.exists():
        raise typer.BadParameter(f"{file} exists already; name another file, or delete it")
    write(file, documents)


if __name__ == "__main__":
    run_script(main)
