"""After which layer does a state know the fact that it asks for? A linear probe by layer and hops (2503.03588, 4.6).

    python -m sparsetrain.recipes.evidence.relay relay --seed 2 --seed 3 --only power --only sliding
    python -m sparsetrain.recipes.evidence.relay_probe relay --seed 2 --seed 3 --only power --only sliding

The models are those that :mod:`~sparsetrain.recipes.evidence.relay` trained, and the one that they started from. Ten
value tokens are the classes: one fact of a document has one of them, which stands nowhere else before its question. The
probe is that of the task ``receptive_field``, with its held-out parts and its control of shuffled labels; it reads the
state of the question's token, in the last block, after each layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from sparsetrain.recipes.evidence.relay import (
    KV_HEADS,
    NEVER,
    facts,
    num_blocks,
    patterns,
    run_folder,
    the_power,
    the_task,
)
from sparsetrain.recipes.evidence.run import choose, opened

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.recall import TOKENS
from sparsetrain.methods.registry import parse_attention
from sparsetrain.patterns import FullPattern
from sparsetrain.recipe import Recipe

CLASSES = 10
SAMPLES = 4 * CLASSES
"""Documents of a block come in as many: each of the probe's held-out parts has each class."""
MEASURED = "probe.json"


class Asked(NamedTuple):
    """A document, one of its facts, and where that is asked for."""

    tokens: np.ndarray
    """int64 ``[length]``."""
    kind: int
    """Which of the classes the value is."""
    block: int
    """Of the fact."""
    question: int
    """The position of its key at the end of the document; the answer comes behind it."""


@dataclass(frozen=True)
class Probed:
    """What a probe finds in the states of one model. Shares are ``[layer][block]``, of the blocks that have facts."""

    method: str
    seed: int
    trained: bool
    samples: int
    """Documents for each block."""
    alone: int
    """Layers before those of the pattern; they connect a block with nothing else."""
    reached: list[list[bool]]
    """Whether the last block depends on the block after the layer: exactly, by the pattern."""
    accuracy: list[list[float]]
    control: list[list[float]]
    """With shuffled labels."""

    def hops(self) -> list[int]:
        """Of each block: layers of the pattern after which the last block depends on it; 0 where it never does."""
        return [
            next((layer + 1 - self.alone for layer, known in enumerate(of) if known), NEVER)
            for of in zip(*self.reached, strict=True)
        ]

    def by_hops(self, layer: int) -> dict[int, float]:
        """The share of values that the probe names after a layer, by hops."""
        found: dict[int, list[float]] = {}
        for hops, share in zip(self.hops(), self.accuracy[layer], strict=True):
            found.setdefault(hops, []).append(share)
        return {hops: float(np.mean(shares)) for hops, shares in found.items()}


def questions(recipe: Recipe, tokenizer: Any, seed: int, samples: int) -> list[Asked]:
    """As many documents for each block that has facts, with each class equally often."""
    section, block = the_task(recipe), the_power(recipe).block
    (length,) = section.source.lengths
    # Facts are in the first half. A document serves the block that has the fewest.
    blocks = length // block // 2
    task = section.model_copy(update={"documents": 2 * samples * blocks}).build(tokenizer, seed)
    rows = task.answered()
    values = np.unique([row.labels[row.labels >= 0] for row in rows[:200]])
    classes, others = values[:CLASSES], values[CLASSES : 2 * CLASSES]
    counts = np.zeros(blocks, dtype=int)
    found: list[Asked] = []
    for row in rows:
        places = facts(row)
        # A layer that reads two tokens takes the last token of a block into the next one.
        inside = [index for index, place in enumerate(places) if (place + 1) % block and place // block < blocks]
        if not inside or len(found) == samples * blocks:
            continue
        chosen = min(inside, key=lambda index: counts[places[index] // block])
        here = places[chosen] // block
        if counts[here] == samples:
            continue
        tokens = row.input_ids.copy()
        for value, other in zip(classes, others, strict=True):
            tokens[row.input_ids == value] = other
        kind, question = int(counts[here] % CLASSES), int(np.flatnonzero(row.labels >= 0)[chosen]) - 1
        tokens[[places[chosen], question + 1]] = classes[kind]
        found.append(Asked(tokens, kind, int(here), question))
        counts[here] += 1
    assert len(found) == samples * blocks
    return found


def probe(
    model: str, attention: dict[str, Any], recipe: Recipe, name: str, seed: int, *, trained: bool, samples: int
) -> Probed:
    """What the states of a model know of the fact that they ask for.

    Args:
        model: a folder of a run or of a model.
        seed: of the documents.
        samples: documents for each block, a multiple of 40.
    """
    import torch

    from sparsetrain.evaluation.receptive_field.probe import accuracy
    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparse_layers, sparsify
    from sparsetrain.randomness import generator

    config, blocks = parse_attention(attention), num_blocks(recipe)
    source = find_model(model)
    asked = questions(recipe, source.tokenizer, seed, samples)
    loaded = sparsify(source.load(None), config).eval()
    states = torch.cat(list(_states(loaded, asked)), dim=1)
    found: list[Any] = []
    control: list[Any] = []
    of_block = np.array([each.block for each in asked])
    for block in range(of_block.max() + 1):
        own = np.flatnonzero(of_block == block)
        labels = np.array([asked[index].kind for index in own])
        mixed = generator(seed, "relay_probe control", block).permutation(labels)
        for shares, kinds in ((found, labels), (control, mixed)):
            shares.append(accuracy(states[:, own], torch.from_numpy(kinds), CLASSES, seed).tolist())
    pattern = config.pattern(KV_HEADS) or FullPattern(the_power(recipe).block)
    sparse = sum(method is not None for _, _, method in sparse_layers(loaded))
    alone = len(states) - sparse
    reached: np.ndarray = np.concatenate([np.zeros((alone, blocks), dtype=bool), pattern.reach(blocks, sparse)])
    reached = reached[:, : len(found)]
    by_layer = [list(map(list, zip(*shares, strict=True))) for shares in (found, control)]
    return Probed(name, seed, trained, samples, alone, reached.tolist(), *by_layer)


def _states(model: Any, asked: list[Asked]) -> Iterator[Any]:
    """The states of the questions of some documents at a time, fp32 ``[layers, documents, hidden]``."""
    import torch

    from sparsetrain.data import Row, collate
    from sparsetrain.data.batch import IGNORE
    from sparsetrain.evaluation.receptive_field.probe import last_states
    from sparsetrain.evaluation.scoring import logits_at

    length, device = len(asked[0].tokens), torch.device("cpu")
    fit = max(1, TOKENS // length)
    for start in range(0, len(asked), fit):
        some = asked[start : start + fit]
        labels = np.full(length, IGNORE)
        batch = collate([Row(each.tokens, labels, [length], [""]) for each in some])
        places = torch.tensor([index * length + each.question for index, each in enumerate(some)])
        with torch.no_grad(), last_states(model, places) as found:
            for _ in logits_at(model, batch, device, places, num_chunks=1):
                pass
        yield torch.stack(found)


def table(probed: list[Probed]) -> str:
    """Markdown: a row for each pattern and layer, with a cell for each number of hops and the control over all of it.
    In brackets where the pattern does not connect fact and question."""
    longest = max(max(each.hops()) for each in probed)
    columns = ["pattern", "after layer", *map(str, range(1, longest + 1)), "never", "control"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for method, trained in dict.fromkeys((each.method, each.trained) for each in probed):
        of = sorted((each for each in probed if (each.method, each.trained) == (method, trained)), key=_seed)
        for layer in range(len(of[0].accuracy)):
            cells = [str(layer + 1)]
            for hops in [*range(1, longest + 1), NEVER]:
                shares = [each.by_hops(layer).get(hops) for each in of]
                told = " / ".join(f"{100 * share:.1f}" for share in shares if share is not None)
                known = hops != NEVER and hops <= layer + 1 - of[0].alone
                cells.append(told if known or not told else f"({told})")
            cells.append(" / ".join(f"{100 * np.mean(each.control[layer]):.1f}" for each in of))
            lines.append(f"| {method}, {'trained' if trained else 'before'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seed(probed: Probed) -> int:
    return probed.seed


def main(
    recipe: Annotated[str, typer.Argument(help="relay, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings of the runs, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of the runs; 2 and 3 by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these patterns.")] = None,
    samples: Annotated[int, typer.Option(help="Documents for each block, a multiple of 40.")] = 400,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Probe the states of models that were trained to relay facts, and of the one that they started from."""
    if samples < 1 or samples % SAMPLES:
        raise typer.BadParameter(f"--samples {samples}: it must be a multiple of {SAMPLES}")
    file, loaded = opened(recipe, settings)
    sections = {name: section for name, section in patterns(loaded).items() if "dense_layers" not in section}
    out = out or Path("runs/evidence") / file.stem
    probed = []
    for number, (name, section) in product(seed or [2, 3], choose(sections, only).items()):
        folder = run_folder(out, name, number)
        if not folder.exists():
            raise typer.BadParameter(
                f"{folder} is not there; train it first: python -m sparsetrain.recipes.evidence.relay {recipe} "
                f"--seed {number} --only {name!r}"
            )
        measured = folder / MEASURED
        found = [Probed(**each) for each in json.loads(measured.read_text())] if measured.exists() else []
        if not found or found[0].samples != samples:
            models = {False: str(loaded.model.path), True: str(folder)}
            found = [
                probe(model, section, loaded, name, number, trained=trained, samples=samples)
                for trained, model in models.items()
            ]
            measured.write_text(json.dumps([asdict(each) for each in found]) + "\n")
        print(table(found), flush=True)
        probed += found
    (out / "probe.json").write_text(json.dumps([asdict(each) for each in probed], indent=1) + "\n")
    (out / "probe.md").write_text(table(probed))
    print(table(probed))


if __name__ == "__main__":
    run_script(main)
