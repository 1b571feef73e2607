"""Weights in 16 bits: the masters and the optimizer stay in fp32, at every ZeRO stage."""

from __future__ import annotations

import pytest

from sparsetrain.cli import main


@pytest.mark.parametrize("stage", [0, 2])
def test_bfloat16_follows_float32(tmp_path, tiny, stages, run_folder, stage):
    """A step that DeepSpeed takes on zeros at start would show in Adam's bias correction, and so in the second loss."""
    run = run_folder(tmp_path / "run")
    overrides = ["model.dtype=bfloat16", f"deepspeed.stage={stage}"]
    assert main(["run", str(tiny), *overrides, "--output", str(run.path)]) == 0
    assert run.values("loss") == pytest.approx(stages(1)[stage].values("loss"), rel=2e-3)
