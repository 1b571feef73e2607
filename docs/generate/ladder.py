"""The table of docs/ladder.md: the longest row that fits with each further setting, by `sparsetrain plan`.

python docs/generate/ladder.py    # writes the table into the page; a test fails where it differs
"""

from __future__ import annotations

from pathlib import Path

from marked import with_part

from sparsetrain.plan.command import make_plan
from sparsetrain.plan.estimate import Plan

PAGE = Path(__file__).resolve().parents[1] / "ladder.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
RECIPE = "qwen3-8b-power-128k"
LENGTHS = [2**power for power in range(10, 21)]
FIXED = (
    "train.global_batch_tokens=null",
    "attention.dense_layers=[]",
    f"model.config_overrides.max_position_embeddings={LENGTHS[-1]}",
)
START = (
    "train.activation_checkpointing=none",
    "train.offload_activations=false",
    "train.loss_chunk=null",
    "train.liger=off",
    "deepspeed.stage=0",
)
RUNGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ()),
    (1, ("lora.rank=16", "lora.train_embeddings=false", "lora.train_norms=false")),
    (1, ("train.loss_chunk=4096",)),
    (1, ("train.activation_checkpointing=layer",)),
    (1, ("train.mlp_chunk=8192",)),
    (1, ("train.offload_activations=true",)),
    (8, ("deepspeed.stage=3",)),
    (8, ("sequence.parallel=8",)),
)
"""GPUs, and the settings that are added to those above."""


def longest(overrides: list[str], gpus: int) -> Plan | None:
    """The plan of the longest row that fits; None where not even the shortest does."""
    found = None
    rows = 1 if "sequence.parallel=8" in overrides else gpus
    for length in LENGTHS:
        given = [*FIXED, f"train.global_batch_sequences={rows}", f"sequence.length={length}", *overrides]
        plan = make_plan(RECIPE, given, gpus=gpus, device="h100")
        if not plan.fits:
            break
        found = plan
    return found


def table() -> str:
    """The rows of the ladder as Markdown."""
    lines = [
        "| settings, each with those above it | GPUs | longest row | GiB of 74.5 | s/step | with full attention |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    overrides = list(START)
    for gpus, added in RUNGS:
        overrides += added
        plan = longest(overrides, gpus)
        words = ", ".join(f"`{each}`" for each in added) or "nothing: all weights trained, everything kept"
        if plan is None:
            lines.append(f"| {words} | {gpus} | none | | | |")
            continue
        length = f"{plan.setting.recipe.sequence.length:,}"
        used, ours, dense = plan.memory.needed / 2**30, plan.time.seconds, plan.dense_time.seconds
        lines.append(f"| {words} | {gpus} | {length} | {used:.1f} | {ours:.3g} | {dense:.3g} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with its table."""
    return with_part(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
