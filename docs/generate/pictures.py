"""What each method reads, drawn by the library's own patterns, and the chart of speed.

python docs/generate/pictures.py    # writes docs/images/*.svg; a test fails where they differ from what this draws
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from crossover import crossover
from sparsek_speed import sparsek_speed
from svg import CHOICE, EMPTY, FAR, SINK, WINDOW, cells, drawing, legend, line, rectangle, text

from sparsetrain.methods.registry import parse_attention
from sparsetrain.patterns import Pattern

IMAGES = Path(__file__).resolve().parents[1] / "images"
SIZE, CELL, LEFT, TOP = 32, 10, 26, 26
STATIC = {
    "power": {},
    "sliding": {},
    "stride": {"stride": 8},
    "dilated": {"window": 5, "dilation": 4},
    "longnet": {},
    "ruler": {},
    "power-base-4": {"method": "power", "base": 4},
    "power-by-layer": {"method": "power", "window": 3, "split": "layers", "farthest": 16},
}
"""The patterns that are drawn, by method where no other is named; far strides are shortened so that 32 blocks show
several."""


def matrix(
    title: str,
    unit: str,
    colour_of: Callable[[int, int], str | None],
    entries: dict[str, str],
    rows: range | None = None,
) -> list[str]:
    """Queries downwards, keys to the right, and a legend below."""
    rows = rows or range(SIZE)
    parts = [text(LEFT, 14, f"keys, {unit} 0 to {SIZE - 1} →", size=12)]
    parts.append(text(14, TOP + len(rows) * CELL, f"← queries {rows[0]} to {rows[-1]}", size=12, turned=True))
    places = [
        (LEFT + column * CELL, TOP + place * CELL, colour_of(row, column) or EMPTY)
        for place, row in enumerate(rows)
        for column in range(row + 1)
    ]
    parts += cells(places, CELL - 1, CELL - 1)
    return parts + legend(LEFT, TOP + len(rows) * CELL + 10, entries)


def height(rows: int, entries: int) -> float:
    return TOP + rows * CELL + 10 + entries * 19


def static(name: str) -> str:
    """A block pattern, and below it what its last block has heard of after each layer."""
    pattern = parse_attention({"method": name, **STATIC[name]}).pattern()
    assert pattern is not None
    shown = pattern.by_layer[-1]
    mask = [set(shown.key_blocks(block)) for block in range(SIZE)]
    windowed = name not in ("dilated", "longnet")
    window = getattr(shown, "window", 1)

    def colour_of(row: int, column: int) -> str | None:
        if column not in mask[row]:
            return None
        if column < pattern.num_sinks:
            return SINK
        return WINDOW if windowed and row - column < window else FAR

    near = {"the window": WINDOW} if windowed else {}
    further = "further blocks" if windowed else "the blocks that are read"
    if shown is not pattern:
        further += f" of one of {len(pattern.by_layer)} layers in turn"
    far = {} if name == "sliding" else {further: FAR}
    sinks = {"the sinks": SINK} if pattern.num_sinks else {}
    entries = near | far | sinks
    return with_reach(f"what a block reads with {name}", matrix(name, "blocks", colour_of, entries), pattern, entries)


def with_reach(title: str, parts: list[str], pattern: Pattern, entries: dict[str, str]) -> str:
    top = height(SIZE, len(entries)) + 24
    layers = 6
    reach = pattern.reach(SIZE, layers)
    parts.append(text(LEFT, top - 8, "what the last block depends on, by layer", size=12))
    for layer in range(layers):
        parts.append(text(LEFT - 6, top + layer * 13 + 10, str(layer + 1), "end", size=12))
    places = [
        (LEFT + column * CELL, top + layer * 13, FAR if reach[layer][column] else EMPTY)
        for layer in range(layers)
        for column in range(SIZE)
    ]
    parts += cells(places, CELL - 1, 11)
    return drawing(LEFT + SIZE * CELL + 8, top + layers * 13 + 4, title, parts)


def full() -> str:
    entries = {"everything before it": WINDOW}
    parts = matrix("full", "tokens", lambda row, column: WINDOW, entries)
    return drawing(LEFT + SIZE * CELL + 8, height(SIZE, 1), "what a token reads with full attention", parts)


def sparsek() -> str:
    """Made-up scores, and the rule of the method: of the tokens that left the window, the ``topk`` largest stay."""
    topk, window, sinks = 5, 5, 1
    draw = random.Random(4)
    scores = [draw.random() for _ in range(SIZE)]

    def colour_of(row: int, column: int) -> str | None:
        if row - column < window:
            return WINDOW
        if column < sinks:
            return SINK
        rivals = sorted(range(sinks, row - window + 1), key=lambda key: -scores[key])
        return FAR if column in rivals[:topk] else None

    entries = {"the window": WINDOW, "the keys of the largest scores so far": FAR, "the sinks": SINK}
    parts = matrix("sparsek", "tokens", colour_of, entries)
    return drawing(LEFT + SIZE * CELL + 8, height(SIZE, 3), "what a token reads with SparseK", parts)


def recycled(rows: range | None = None) -> str:
    """Made-up choices. Rows that choose read everything; those between read the chosen keys and all since."""
    prompt, every, keep = 8, 6, 5
    draw = random.Random(9)
    chosen: dict[int, set[int]] = {}
    for start in range(prompt - 1, SIZE, every):
        chosen[start] = set(draw.sample(range(start + 1), keep))

    def colour_of(row: int, column: int) -> str | None:
        starts = [start for start in chosen if start <= row]
        if not starts or row in chosen:
            return CHOICE if row in chosen else WINDOW
        if column > starts[-1]:
            return WINDOW
        return FAR if column in chosen[starts[-1]] else None

    entries = {
        "a token that reads everything and chooses": CHOICE,
        "the chosen keys": FAR,
        "tokens since the choice" + ("" if rows else ", and the prompt"): WINDOW,
    }
    shown = rows or range(SIZE)
    parts = matrix("recycled", "tokens", colour_of, entries, rows)
    title = "which keys are read again between two choices"
    return drawing(LEFT + SIZE * CELL + 8, height(len(shown), 3), title, parts)


def twilight(p: float = 0.85) -> str:
    """Made-up weights of one step: of the keys, the fewest that hold a share ``p`` of the softmax weight."""
    draw = random.Random(3)
    count = 40
    raw = [draw.lognormvariate(0.0, 1.6) for _ in range(count)]
    weights = [each / sum(raw) for each in raw]
    kept, held = set(), 0.0
    for key in sorted(range(count), key=lambda each: -weights[each]):
        if held >= p:
            break
        kept.add(key)
        held += weights[key]
    tall, base = 130 / max(weights), 160
    parts = [text(LEFT, 14, "weight of each key in one step", size=12)]
    for key, weight in enumerate(weights):
        colour = FAR if key in kept else "#80808090"
        parts.append(rectangle(LEFT + key * 8, base - weight * tall, 7, max(weight * tall, 1), colour))
    parts.append(line(LEFT, base + 1, LEFT + count * 8, base + 1))
    read = f"read: {len(kept)} of {count} keys, {held:.0%} of the weight (p = {p:g})"
    parts += legend(LEFT, base + 12, {read: FAR, "left out, and kept in the cache": "#80808090"})
    return drawing(LEFT + count * 8 + 34, base + 54, "the fewest keys that hold a share p of the weight", parts)


def all_pictures() -> dict[str, str]:
    """Every drawing by its file name."""
    drawn = {f"{name}-pattern.svg": static(name) for name in STATIC}
    drawn |= {"full-pattern.svg": full(), "sparsek-pattern.svg": sparsek(), "recycled-pattern.svg": recycled()}
    drawn |= {"twilight.svg": twilight(), "refresh.svg": recycled(range(13, 26)), "crossover.svg": crossover()}
    drawn["sparsek-speed.svg"] = sparsek_speed()
    return drawn


if __name__ == "__main__":
    for name, content in all_pictures().items():
        (IMAGES / name).write_text(content, encoding="utf-8")
        print(IMAGES / name)
