"""Train one recipe with every static pattern at one budget of keys, and tell how many facts each finds by hops.

    python -m sparsetrain.recipes.evidence.relay relay --seed 2 --seed 3
    python -m sparsetrain.recipes.evidence.relay relay --only power --only sliding train.steps=300

A fact in a block that the questions' block does not read has to be relayed by blocks between them: as many layers must
pass it on as the pattern needs hops (2503.03588, section 3). The recipe's attention is power; the budgets of the others
follow from it. Runs are those of :mod:`~sparsetrain.recipes.evidence.run`, and are not repeated.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from sparsetrain.recipes.evidence.run import attention_setting, choose, opened, train

from sparsetrain.cli.entry import run_script
from sparsetrain.evaluation.tasks.recall import Recall, RecallSection
from sparsetrain.methods.power import PowerConfig
from sparsetrain.methods.registry import parse_attention
from sparsetrain.patterns import FullPattern, LongNetPattern, Pattern
from sparsetrain.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sparsetrain.data import Row

MEASURED = "relay.json"
NEVER = 0
"""Hops of a block that is never reached."""
DENSE = {"2 dense": {"count": 2, "every": 7, "first": 2}, "1 dense": {"count": 1, "every": 6, "first": 3}}
"""The dense layers of hybrids: two in seven, as in the paper's retrieval models, and one to five sparse ones (the first
layer reads two tokens in any case, so that this takes a model of seven: ``relay_base --layers 7``)."""
KV_HEADS = 2
"""Of relay.yaml's and relay-long.yaml's models, among which variants split distances."""


@dataclass(frozen=True)
class Outcome:
    """What one model finds in documents of one length."""

    method: str
    seed: int
    blocks: float
    """Blocks that a block reads, in the mean."""
    most_blocks: int
    """The most that one reads."""
    layers: int
    """Layers that have the pattern."""
    dense: int
    """Layers that it left dense."""
    hops: list[int]
    """Hops from the last block to each block, 0 where there is no way."""
    asked: list[int]
    """Answers asked for, by the block of the fact."""
    found: list[int]
    """Those found."""

    def by_hops(self) -> dict[int, tuple[int, int]]:
        """Answers found and asked for, by hops."""
        sums: dict[int, tuple[int, int]] = {}
        for hops, asked, found in zip(self.hops, self.asked, self.found, strict=True):
            before = sums.get(hops, (0, 0))
            if asked:
                sums[hops] = before[0] + found, before[1] + asked
        return dict(sorted(sums.items(), key=lambda item: item[0] or len(self.hops) + 1))

    def ceiling(self) -> float:
        """The share of the answers whose fact is within as many hops as there are layers; a dense one reaches all."""
        if self.dense:
            return 1.0
        within = [asked for hops, asked in zip(self.hops, self.asked, strict=True) if NEVER < hops <= self.layers]
        return sum(within) / sum(self.asked)


def patterns(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The attention section of each pattern, all with the budget of a power recipe at the length that it measures.

    Raises:
        typer.BadParameter: the recipe's attention is not power.
    """
    return with_hybrids(the_power(recipe), num_blocks(recipe), KV_HEADS)


def with_hybrids(power: PowerConfig, blocks: int, kv_heads: int) -> dict[str, dict[str, Any]]:
    """The attention section of each pattern, all with the budget of power among so many blocks, and of each with dense
    layers."""
    sparse = {**at_one_budget(power, blocks), **variants(power, blocks, kv_heads)}
    hybrids = {
        f"{name}, {kind}": {**section, "dense_layers": rule}
        for kind, rule in DENSE.items()
        for name, section in sparse.items()
    }
    return {"full": {"method": "full"}, **sparse, **hybrids}


def at_one_budget(power: PowerConfig, blocks: int) -> dict[str, dict[str, Any]]:
    """The attention section of each static pattern, with as many blocks at most as power has among so many."""
    budget, near = power.pattern().max_key_blocks(blocks), {"sinks": power.sinks}
    # As the paper's 6 + 1 + 3 of 128 blocks (2503.03588, section 4.1): the far ones at even distances.
    window = power.window + 1
    stride = math.ceil(blocks / (budget - window - power.sinks + 1))
    segments = longest_segments(power.pattern(), blocks)
    sparse: dict[str, dict[str, Any]] = {
        "power": {"method": "power", "window": power.window, **near},
        "sliding": {"method": "sliding", "window": budget - power.sinks, **near},
        "stride": {"method": "stride", "window": window, "stride": stride, **near},
        "dilated": {"method": "dilated", "window": budget, "dilation": 2},
        "longnet": {"method": "longnet", "segments": segments},
        "longnet, shifted": {"method": "longnet", "segments": segments, "head_shift": True},
    }
    return {name: {**section, "block": power.block} for name, section in sparse.items()}


def variants(power: PowerConfig, blocks: int, kv_heads: int) -> dict[str, dict[str, Any]]:
    """Variants of power. What a head or a layer no longer reads of the far blocks, it reads of the near ones."""
    budget, near = power.pattern().max_key_blocks(blocks), {"sinks": power.sinks}
    whole: dict[str, Any] = {"method": "power", "window": power.window, **near}
    parts = {**whole, "farthest": blocks - 1}
    sparse: dict[str, dict[str, Any]] = {
        "power, by layer": widest({**parts, "split": "layers", "farthest": blocks // 2}, blocks, budget, kv_heads),
        "power, by head": widest({**parts, "split": "heads"}, blocks, budget, kv_heads),
        "power, base 4, by head": widest({**parts, "split": "heads", "base": 4}, blocks, budget, kv_heads),
        "power, base 4": {**whole, "base": 4},  # which is more than the budget
        "ruler": {"method": "ruler", "window": power.window, "levels": blocks.bit_length() - 1, **near},
    }
    return {name: {**section, "block": power.block} for name, section in sparse.items()}


def widest(section: dict[str, Any], blocks: int, budget: int, kv_heads: int) -> dict[str, Any]:
    """A section with the widest window with which no block reads more than the budget."""
    for window in range(budget, 1, -1):
        wider = {**section, "window": window}
        pattern = parse_attention(wider).pattern(kv_heads)
        if pattern is not None and pattern.max_key_blocks(blocks) <= budget:
            return wider
    return section


def longest_segments(power: Pattern, blocks: int) -> list[list[int]]:
    """LongNet's levels as the paper has them, of 8 to 128 blocks at rates 1 to 16, for other numbers of blocks: the
    longest first segment with which no more blocks are read than by power, in the mean."""
    length = blocks
    while length > 1:
        levels = [(length << level, 1 << level) for level in range((blocks // length).bit_length())]
        if LongNetPattern(power.block, tuple(levels)).listed(blocks) <= power.listed(blocks):
            break
        length //= 2
    return [list(level) for level in levels]


def num_blocks(recipe: Recipe) -> int:
    """The blocks of the documents that are measured. All questions are in the last.

    Raises:
        typer.BadParameter: they are not, or the length is no whole number of blocks.
    """
    section, block = the_task(recipe), the_power(recipe).block
    (length,) = section.source.lengths
    if length % block or 2 * section.source.keys > block:
        raise typer.BadParameter(
            f"attention.block={block}: documents of {length} tokens must be whole blocks, and the questions for "
            f"{section.source.keys} keys must fit into the last"
        )
    return length // block


def the_power(recipe: Recipe) -> PowerConfig:
    """The attention of a recipe.

    Raises:
        typer.BadParameter: it is another method's.
    """
    if not isinstance(recipe.attention, PowerConfig):
        method = recipe.attention.method
        raise typer.BadParameter(f"attention.method={method}; the comparison starts from power")
    return recipe.attention


def the_task(recipe: Recipe) -> RecallSection:
    """The one task of a recipe."""
    (section,) = recipe.eval.tasks
    assert isinstance(section, RecallSection)
    return section


def measure(
    model: str, attention: dict[str, Any], tasks: dict[str, RecallSection], block: int, name: str, seed: int
) -> dict[str, Outcome]:
    """What a model finds with a pattern, by the block of each fact.

    Args:
        model: a folder of a run or of a model.
        tasks: each with documents of one length, by name.
        block: tokens of a block.
        seed: of the documents.
    """
    import torch

    from sparsetrain.inference.models import find_model
    from sparsetrain.modeling import sparse_layers, sparsify

    config = parse_attention(attention)
    source = find_model(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = sparsify(source.load(None), config).eval().to(device)
    # LongNet's shifts differ between KV heads.
    pattern = config.pattern(loaded.config.num_key_value_heads) or FullPattern(block)
    dense = config.resolve_dense_layers(loaded.config.num_hidden_layers)
    layers = [index for index, _, method in sparse_layers(loaded) if method is not None and index not in dense]
    outcomes = {}
    for label, section in tasks.items():
        blocks = section.source.lengths[0] // block
        lists = [part.listed(blocks, head) for part in pattern.by_layer for head in part.heads]
        task = section.build(source.tokenizer, seed)
        asked, found = by_block(loaded, task, block, blocks, device)
        outcomes[label] = Outcome(
            name,
            seed,
            sum(lists) / len(lists) / blocks,
            pattern.max_key_blocks(blocks),
            len(layers),
            len(dense),
            hops(pattern, blocks, len(layers)),
            asked,
            found,
        )
    return outcomes


def by_block(
    model: PreTrainedModel, task: Recall, block: int, blocks: int, device: torch.device
) -> tuple[list[int], list[int]]:
    """Answers asked for and found, by the block of the fact."""
    import torch

    from sparsetrain.data import collate
    from sparsetrain.evaluation.scoring import predictions

    asked, found = [0] * blocks, [0] * blocks
    for questions in task.passes:
        with torch.no_grad():
            logits, labels, _ = next(predictions(model, collate(questions.rows), device, 1))
        wrong = set(questions.answers[(logits.argmax(-1) != labels).cpu()].tolist())
        places = np.concatenate([facts(row) for row in questions.rows]) // block
        for answer, place in enumerate(places.tolist()):
            asked[place] += 1
            found[place] += answer not in wrong
    return asked, found


def facts(row: Row) -> np.ndarray:
    """The positions of the facts that a document asks for, in the order of the questions.

    An answer stands behind the same token in its fact as behind its question: a key, or "is"; and nowhere else.
    """
    asked = np.flatnonzero(row.labels >= 0)
    spans = np.split(asked, np.flatnonzero(np.diff(asked) > 1) + 1)
    places = []
    for span in spans:
        told = row.input_ids[span[0] - 1 : span[-1] + 1]
        windows = np.lib.stride_tricks.sliding_window_view(row.input_ids, len(told))
        places.append(int((windows == told).all(-1).argmax()) + 1)
    return np.array(places)


def hops(pattern: Pattern, blocks: int, layers: int) -> list[int]:
    """The hops from the last of ``blocks`` blocks to each of them; :data:`NEVER` where there is no way, which where
    layers differ depends on their number."""
    if len(pattern.by_layer) == 1:
        reach = pattern.reach(blocks, blocks)
        return np.where(reach[-1], reach.argmax(0) + 1, NEVER).tolist()
    fewest = {blocks - 1: 0}
    for layer in reversed(range(layers)):
        turn = pattern.by_layer[layer % len(pattern.by_layer)]
        for block, count in list(fewest.items()):
            for key in {key for head in turn.heads for key in turn.key_blocks(block, head)}:
                fewest[key] = min(fewest.get(key, blocks), count + 1)
    return [fewest.get(block, NEVER) or NEVER for block in range(blocks - 1)] + [1]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each pattern, and cells with the answers found with each seed, in all and by hops."""
    longest = max(max(outcome.by_hops()) for outcome in outcomes)
    columns = ["pattern", "blocks", "within reach", "found", *map(str, range(1, longest + 1)), "never"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        of = sorted((outcome for outcome in outcomes if outcome.method == method), key=lambda outcome: outcome.seed)
        cells = [f"{of[0].blocks:.1f}, at most {of[0].most_blocks}"]
        cells += [
            " / ".join(_percent(value) for value in values)
            for values in (
                [outcome.ceiling() for outcome in of],
                [sum(outcome.found) / sum(outcome.asked) for outcome in of],
            )
        ]
        for distance in [*range(1, longest + 1), NEVER]:
            shares = [outcome.by_hops().get(distance) for outcome in of]
            cells.append(" / ".join(_percent(share[0] / share[1]) for share in shares if share) or "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def run_folder(out: Path, name: str, seed: int) -> Path:
    """The folder of a pattern's run."""
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def main(
    recipe: Annotated[str, typer.Argument(help="relay, or a file.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Settings for every run, as a.b=c.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each pattern; 2 and 3 by default.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only these patterns.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default runs/evidence/RECIPE.")] = None,
) -> None:
    """Compare static patterns with one budget of keys on facts that have to be relayed."""
    file, loaded = opened(recipe, settings)
    chosen = choose(patterns(loaded), only)
    out = out or Path("runs/evidence") / file.stem
    out.mkdir(parents=True, exist_ok=True)

    def run(case: tuple[int, str]) -> tuple[int, str, Path]:
        number, name = case
        folder = run_folder(out, name, number)
        own = [*(settings or []), attention_setting(chosen[name]), "checkpoint.export=true"]
        train(file, name, number, own, folder)
        return number, name, folder

    outcomes = []
    with ThreadPoolExecutor(parallel) as pool:
        for number, name, folder in pool.map(run, product(seed or [2, 3], chosen)):
            # Here and not beside the runs: transformers cannot load two models at a time.
            measured = folder / MEASURED
            if not measured.exists():
                of = measure(str(folder), chosen[name], {"": the_task(loaded)}, the_power(loaded).block, name, number)
                measured.write_text(json.dumps(asdict(of[""])) + "\n")
            outcomes.append(Outcome(**json.loads(measured.read_text())))
            print(table(outcomes[-1:]), flush=True)
    (out / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (out / "table.md").write_text(table(outcomes))
    print(table(outcomes))


if __name__ == "__main__":
    run_script(main)
