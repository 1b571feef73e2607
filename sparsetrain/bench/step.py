"""A training step of a model of a real shape with random weights: time, tokens per second, peak memory by attention."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparsetrain.bench.options import check_output, parse_lengths
from sparsetrain.bench.report import machine
from sparsetrain.bench.timing import explain, once_ms, peak, release
from sparsetrain.errors import BenchError

GIB = 2**30
REPEATS = 3
LOSS_CHUNK = 4096
"""Positions whose logits exist at a time."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
"""Llama models by name; ``tiny`` is what a CPU can do."""

ATTENTIONS: dict[str, dict[str, Any] | None] = {
    "sdpa": None,
    "power": {"method": "power", "block": 256, "window": 5, "sinks": 1},
    "sliding": {"method": "sliding", "block": 256, "window": 9, "sinks": 1},
}
"""transformers' own SDPA, and methods of ours."""


@dataclass
class StepRow:
    """One step: forward, and backward into the gradients of all weights; the optimizer, which no length changes, is
    left out."""

    length: int
    attention: str
    ms: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    """All memory that torch has allocated at the peak: weights, gradients and activations."""
    reason: str = ""


def run_step(*, shape: str | None, lengths: str | None, attentions: str, output: Path | None) -> list[StepRow]:
    """Measure, print, and write to ``output`` where given.

    Raises:
        BenchError: an option cannot be measured or written to.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or ("llama-3.2-1b" if device.type == "cuda" else "tiny")
    if shape not in SHAPES:
        raise BenchError(f"--shape {shape}: there is none of that name; choose from {', '.join(SHAPES)}")
    names = attentions.split(",")
    if unknown := [name for name in names if name not in ATTENTIONS]:
        raise BenchError(f"--attentions {unknown[0]}: there is no such attention; choose from {', '.join(ATTENTIONS)}")
    sizes = parse_lengths(lengths or ("32768,131072" if device.type == "cuda" else "1024"))
    check_output(output)
    if device.type == "cpu":
        print("No GPU: these are CPU timings of a tiny model, and no memory is counted.")
    rows = []
    for row in _measure(SHAPES[shape], sizes, names, device):
        rows.append(row)
        print(f"{row.length:>9,}  {row.attention:8}  {row.reason or f'{row.ms:.4g} ms'}", file=sys.stderr, flush=True)
        if output is not None:
            _write(rows, shape, output)
    Console(highlight=False).print(_table(rows, shape))
    return rows


def _measure(
    shape: dict[str, Any], lengths: tuple[int, ...], names: list[str], device: torch.device
) -> Iterator[StepRow]:
    for length in lengths:
        for name in names:
            row = StepRow(length, name)
            try:
                row.ms, row.peak_gib = measure_step(shape, length, ATTENTIONS[name], device)
                row.tokens_per_second = 1e3 * length / row.ms
            except Exception as error:
                row.reason = explain(error)
            release()
            yield row


def measure_step(
    shape: dict[str, Any], length: int, attention: dict[str, Any] | None, device: torch.device
) -> tuple[float, float | None]:
    """Median time in ms and peak memory in GiB of a step on one sequence, every layer checkpointed, bf16 on CUDA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsetrain.modeling import sparsify
    from sparsetrain.training.loss import CausalLMLoss

    config = LlamaConfig(**{**shape, "max_position_embeddings": length, "attn_implementation": "sdpa"})
    with device:
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if attention is not None:
        sparsify(model, attention)
    loss = CausalLMLoss(model, LOSS_CHUNK)
    tokens = torch.randint(config.vocab_size, (1, length), device=device)
    where = torch.arange(length - 1, device=device)
    batch = {
        "input_ids": tokens,
        "position_ids": torch.arange(length, device=device)[None],
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32, device=device),
        "positions": where,
        "targets": tokens[0, 1:],
        "num_chunks": -(-length // LOSS_CHUNK),
    }

    def step() -> None:
        model.zero_grad(set_to_none=True)
        (loss(**batch) / length).backward()

    step()  # compiles
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    _, extra = peak(step, device)
    times = [once_ms(step, device)[1] for _ in range(REPEATS)]
    return median(times), None if extra is None else (base + extra) / GIB


def _table(rows: list[StepRow], shape: str) -> Table:
    table = Table(title=f"A training step of the shape of {shape}, one sequence, every layer checkpointed", box=None)
    for column in ("tokens", "attention", "ms", "tokens/s", "peak GiB", ""):
        table.add_column(column, justify="left" if column in ("attention", "") else "right")
    for row in rows:
        numbers = (row.ms, row.tokens_per_second, row.peak_gib)
        cells = ["-" if number is None else f"{number:,.1f}" for number in numbers]
        table.add_row(f"{row.length:,}", row.attention, *cells, row.reason)
    return table


def _write(rows: list[StepRow], shape: str, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    facts = {"command": shlex.join(["sparsetrain", *sys.argv[1:]]), "shape": shape, "machine": machine()}
    content = {**facts, "rows": [asdict(row) for row in rows]}
    (output / "step.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with (output / "step.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(StepRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
