"""Conversations of the kind that the task ``multi_turn`` asks, with their answers, to train a model that ends them.

    python -m sparsetrain.recipes.evidence.turns runs/evidence/turns.jsonl --longest 4096

A row is a chat: a text that tells the numbers of keys, and questions about some of them, each with its answer. Texts,
questions and answers are made by the task's own code. No conversation is one of an evaluation: that draws by the seed
of a recipe, and these by one of their own. Short conversations with few keys are the most: they lead the way.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.generative.fit import Sample
from sparsetrain.evaluation.multi_turn.prompts import Questions, Talks
from sparsetrain.evaluation.tasks.multi_turn import MultiTurnSection
from sparsetrain.randomness import generator

TEMPLATE = "mistral"
"""That of turns.yaml: it ends an answer with the tokenizer's own EOS."""
KINDS = ((320, 2, 2), (512, 4, 3), (1024, 8, 5), (2048, 20, 8), (4096, 20, 8), (8192, 20, 8))
"""Tokens of a conversation, keys that its text tells, and questions."""


class Conversations(Talks):
    """Makes conversations with their answers, as rows of a chat."""

    def prompts(self, kind: str, length: int, index: int, sample: Sample) -> list[Any]:
        """The turns of a conversation."""
        assert isinstance(sample, Questions)
        messages = []
        for each in (sample, *sample.later):
            answer = f"{each.prefix} {each.references[0]}"
            messages += [{"role": "user", "content": each.text}, {"role": "assistant", "content": answer.strip()}]
        return [{"messages": messages}]


def of_kind(kind: tuple[int, int, int], tokens: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a chat, the same ones every time.

    Args:
        kind: one of :data:`KINDS`.
        tokens: of all rows, about.
        seed: rows of one are other ones than those of any other, and than those of an evaluation.
    """
    from sparsetrain.modeling.places import resolve
    from sparsetrain.modeling.tokenizers import load_tokenizer
    from sparsetrain.recipe.chat_templates import chat_template_text

    tokenizer = load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")
    tokenizer.chat_template = chat_template_text(TEMPLATE)
    length, keys, turns = kind
    section = MultiTurnSection(lengths=[length], samples=max(1, tokens // length), turns=turns, keys=keys)
    # Far from all that a recipe would have.
    own = int(generator(seed, "conversations to train on").integers(2**62, 2**63))
    return Conversations(section, tokenizer, own).all()


def conversations(longest: int, tokens: int, seed: int, parallel: int = 1) -> list[dict[str, Any]]:
    """Rows of every kind up to the longest conversations, as many tokens of each.

    Args:
        longest: tokens of a conversation.
        tokens, seed: as for :func:`of_kind`.
        parallel: processes; the rows do not depend on it.
    """
    kinds = [kind for kind in KINDS if kind[0] <= longest]
    make = partial(of_kind, tokens=tokens // len(kinds), seed=seed)
    if parallel == 1:
        made = [make(kind) for kind in kinds]
    else:
        with ProcessPoolExecutor(parallel, mp_context=get_context("spawn")) as pool:
            made = list(pool.map(make, kinds))
    return [row for rows in made for row in rows]


def main(
    file: Annotated[Path, typer.Argument(help="A .jsonl that is written.")],
    longest: Annotated[int, typer.Option(help="Tokens of the longest conversations: 320, 512, 1024, ... 8192.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Of all conversations, about.")] = 10_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Another one gives other conversations.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Write conversations about texts that tell the numbers of keys."""
    if file.exists():
        raise typer.BadParameter(f"{file} exists already; name another file, or delete it")
    lengths = [length for length, _, _ in KINDS]
    if longest not in lengths:
        raise typer.BadParameter(f"--longest {longest} is none of {', '.join(map(str, lengths))}; give one of them")
    rows = conversations(longest, tokens, seed, parallel)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    run_script(main)
