"""The table of docs/million-tokens.md: what a step over a million tokens is planned to take.

python docs/generate/million.py    # writes the table into the page; a test fails where it differs
"""

from __future__ import annotations

from pathlib import Path

from marked import with_part

from sparsetrain.plan.command import make_plan

PAGE = Path(__file__).resolve().parents[1] / "million-tokens.md"
BEGIN, END = "<!-- begin of the plans -->\n", "<!-- end of the plans -->\n"
FOUR = ("sequence.parallel=4",)
OFFLOADED = ("train.offload_activations=true",)
ROWS: tuple[tuple[str, int, str, tuple[str, ...]], ...] = (
    ("qwen3-8b-power-lora-1m", 8, "h200", ()),
    ("qwen3-8b-power-lora-1m", 8, "h200", ("attention.dense_layers=[0,18]",)),
    ("qwen3-8b-power-lora-1m", 8, "h100", ()),
    ("qwen3-8b-power-lora-1m", 4, "h200", FOUR),
    ("qwen3-8b-power-lora-1m", 4, "h200", (*FOUR, *OFFLOADED)),
    ("llama-3.1-8b-power-lora-1m", 8, "h200", ()),
    ("llama-3.1-8b-power-lora-1m", 4, "h200", (*FOUR, *OFFLOADED)),
)
"""Recipe, GPUs, their kind, and overrides."""


def table() -> str:
    """The plans as Markdown."""
    lines = [
        "| recipe, settings | GPUs | s/step | of it waiting | with full attention | GiB a GPU | host GiB in all |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, gpus, device, overrides in ROWS:
        plan = make_plan(name, overrides, gpus=gpus, device=device, liger=True)
        settings = "".join(f", `{each}`" for each in overrides)
        time, memory = plan.time, plan.memory
        cells = (
            f"`{name}`{settings}",
            f"{gpus} x {device.upper()}",
            f"{time.seconds:.3g}",
            f"{time.communication:.2g}",
            f"{plan.dense_time.seconds:.3g}",
            f"{memory.needed / 2**30:.1f} of {plan.capacity / 2**30:.1f}",
            f"{memory.host * gpus / 2**30:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with its table."""
    return with_part(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
