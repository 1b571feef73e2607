"""``sparsetrain eval`` on a GPU: every task, with full attention and with a pattern, measures what a CPU measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "perplexity": {"tokens": 2048, "stride": 256},
    "key_tokens": {"tokens": 2048},
    "attention_error": {},
    "passkey": {"trials": 2},
    "ruler": {"tasks": ["fwe", "vt"], "samples": 2},
    "reasoning": {"samples": 1},
    "multi_turn": {"samples": 2},
}


def measured(task: str, device: str, folder: Path) -> dict[str, Any]:
    """The rows that the command writes: full attention and a pattern, in fp32."""
    settings = [f"eval.tasks.{task}.{name}={json.dumps(value)}" for name, value in SETTINGS[task].items()]
    rows = ["--attention", "dense", "--attention", "{method: power, block: 16}"]
    output = folder / f"{device}.json"
    options = ["--lengths", "1k", "--device", device, "--dtype", "float32", "--output", str(output)]
    assert main(["eval", "sparsetrain:tiny", "--tasks", task, *settings, *rows, *options]) == 0
    return {label: row["tasks"] for label, row in json.loads(output.read_text())["rows"].items()}


def compare(found: Any, wanted: Any, place: str) -> list[str]:
    """Where two results differ by more than rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), place
        return [fault for key in wanted for fault in compare(found[key], wanted[key], f"{place}/{key}")]
    if isinstance(wanted, list):
        assert len(found) == len(wanted), place
        pairs = enumerate(zip(found, wanted, strict=True))
        return [fault for index, (one, other) in pairs for fault in compare(one, other, f"{place}/{index}")]
    same = found == wanted or (isinstance(wanted, float) and found == pytest.approx(wanted, rel=2e-3, abs=2e-3))
    return [] if same else [f"{place}: {found} on the GPU, {wanted} on the CPU"]


@pytest.mark.parametrize("task", SETTINGS)
def test_a_task_measures_what_a_cpu_measures(task: str, tmp_path: Path) -> None:
    found, wanted = measured(task, "cuda", tmp_path), measured(task, "cpu", tmp_path)
    assert found.keys() == wanted.keys()
    assert len(found) == 2
    assert not compare(found, wanted, task)
