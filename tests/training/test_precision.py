"""Weights in 16 bits: the masters and the optimizer stay in fp32, at every ZeRO stage."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.cli import main
from sparsetrain.training.distributed.half_step import wait_once


@pytest.mark.parametrize("stage", [0, 2])
def test_bfloat16_follows_float32(tmp_path, tiny, stages, run_folder, stage):
    """A step that DeepSpeed takes on zeros at start would show in Adam's bias correction, and so in the second loss."""
    run = run_folder(tmp_path / "run")
    overrides = ["model.dtype=bfloat16", f"deepspeed.stage={stage}"]
    assert main(["run", str(tiny), *overrides, "--output", str(run.path)]) == 0
    assert run.values("loss") == pytest.approx(stages(1)[stage].values("loss"), rel=2e-3)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor, for which it waits on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_without_zero_a_step_in_16_bits_is_deepspeeds_but_reads_the_device_once(world):
    """The second of three gradients is clipped, and the third isn't finite."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    def trained(own):
        torch.manual_seed(0)
        weights = [torch.randn(size, dtype=torch.bfloat16).requires_grad_() for size in ((7, 5), (5,), (3,))]
        groups = [{"params": weights[:1]}, {"params": weights[1:]}]
        inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        engine = SimpleNamespace(
            optimizer=FP16_UnfusedOptimizer(inner, clip_grad=1.0, low_precision_dtype=torch.bfloat16)
        )
        if own:
            wait_once(engine)
        told = []
        for size in (0.05, 5.0, math.inf):
            for weight in weights[:2]:  # the third gets no gradient
                weight.grad = torch.full_like(weight, size)
            with Reads() as reads:
                overflow = engine.optimizer.step()
            told.append((bool(overflow), engine.optimizer._global_grad_norm, reads.count))
            engine.optimizer.zero_grad()
        return weights, [master for group in engine.optimizer.fp32_groups for master in group], told

    (weights, masters, told), (expected, their_masters, theirs) = trained(True), trained(False)
    assert [reads for *_, reads in told] == [1, 1, 1]
    assert [overflow for overflow, *_ in told] == [overflow for overflow, *_ in theirs] == [False, False, True]
    assert [norm for _, norm, _ in told] == pytest.approx([norm for _, norm, _ in theirs], rel=1e-6)
    for mine, other in zip([*weights, *masters], [*expected, *their_masters], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
