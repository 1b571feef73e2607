"""The host runs ahead of the CUDA device: in a step our code waits for it where the metrics are read, nowhere else.

That place is the end of ``Stepper.take``: one read, in every step, logged or not, of the loss (is it finite?), the
signals, and what DeepSpeed left of the gradient's norm; and in a logged step, of what the attention methods observed.
Without ZeRO, the step of 16-bit weights is ours too, and asks once whether the gradient is finite.

Waits of others are not judged, only printed (``pytest -s``). By their sources these are, in DeepSpeed 0.19, in every
step a few reads of the gradient's norm and overflow under ZeRO; in transformers, one look in every forward pass at
whether positions restart; in Liger's fused loss, the number of its targets. Operations in C++ under ``backward`` warn
when it returns, and so count as DeepSpeed's, which called it; our own backward passes are in Python and count as ours.
"""

from __future__ import annotations

import inspect
import json
import sys
import sysconfig
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import sparsetrain_kernels
import torch

import sparsetrain
from sparsetrain.activity import activity
from sparsetrain.cli import main
from sparsetrain.training.step import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FIRST, LAST = 3, 6
"""Steps that are watched: kernels are compiled and optimizer states made by then."""
LOGGED = (4, 6)
OURS = tuple(f"{Path(package.__file__).parent}/" for package in (sparsetrain, sparsetrain_kernels))
TORCH, STDLIB = f"{Path(torch.__file__).parent}/", f"{sysconfig.get_path('stdlib')}/"
SPARSEK = "attention={method: sparsek, topk: 64, window: 64, sinks: 4}"
LORA = "lora={rank: 4, targets: linear}"

_LINES, _START = inspect.getsourcelines(Stepper.take)
(READ,) = (_START + index for index, line in enumerate(_LINES) if "self._over_ranks(" in line)
"""The line of the step from which on it reads the metrics."""


class Wait(NamedTuple):
    """The innermost frame that is neither torch's nor Python's own where the host waited."""

    step: int
    file: str
    line: int
    function: str

    @property
    def ours(self):
        return self.file.startswith(OURS)

    @property
    def reads_metrics(self):
        if self.function == "Stepper.take":
            return self.line >= READ
        if self.function == "Stepper._over_ranks":
            return True
        return "observations" in self.function and self.step in LOGGED


def find_wait():
    frame = sys._getframe(1)
    while frame.f_back is not None and _passed_over(frame.f_code.co_filename):
        frame = frame.f_back
    return Wait(activity.step, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)


def _passed_over(file):
    if file.startswith((TORCH, "<")) or file == __file__:
        return True
    return file.startswith(STDLIB) and "-packages/" not in file


@pytest.fixture
def waits(monkeypatch):
    """Filled during the watched steps of a run in this process."""
    found = []
    step, synchronize = Stepper.take, torch.cuda.synchronize
    with ExitStack() as watching:

        def warned(message, *_, **__):
            if "synchronizing CUDA operation" in str(message):
                found.append(find_wait())

        def synchronized(*arguments):
            found.append(find_wait())
            synchronize(*arguments)

        def watched(stepper, *arguments):
            if stepper.state.step + 1 == FIRST:
                watching.enter_context(warnings.catch_warnings())
                warnings.simplefilter("always")
                watching.enter_context(pytest.MonkeyPatch.context()).setattr(warnings, "showwarning", warned)
                watching.enter_context(pytest.MonkeyPatch.context()).setattr(torch.cuda, "synchronize", synchronized)
                watching.callback(torch.cuda.set_sync_debug_mode, "default")
                torch.cuda.set_sync_debug_mode("warn")
            result = step(stepper, *arguments)
            if stepper.state.step + 1 == LAST:
                watching.close()
            return result

        monkeypatch.setattr(Stepper, "take", watched)
        yield found


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("method", ["power", "sparsek"])
def test_our_code_waits_where_metrics_are_read_and_nowhere_else(
    tiny, pretrained, tmp_path, waits, method, trained, stage
):
    model = json.dumps({"path": str(pretrained / "untied"), "dtype": "bfloat16"})
    overrides = [f"model={model}", LORA] if trained == "lora" else []
    overrides += [SPARSEK] if method == "sparsek" else []
    # Two passes a step and checkpointed layers: the host would wait between the passes and in a recompute too.
    overrides += ["train.micro_batch=2", "train.activation_checkpointing=layer"]
    overrides += [f"deepspeed.stage={stage}", f"train.steps={LAST}", "train.log_every=2"]
    assert main(["run", str(tiny), *overrides, "--output", str(tmp_path / "run")]) == 0

    for (file, line, function), times in sorted(Counter(wait[1:] for wait in waits).items()):
        print(f"{times:4} {file}:{line} {function}")
    # Without ZeRO, weights of 16 bits take a step only if the gradient is finite, for which the host has to know it.
    asked = {wait.step for wait in waits if wait.function.endswith("HalfStep.step")}
    assert sorted(asked) == (list(range(FIRST, LAST + 1)) if stage == 0 else [])
    mine = [wait for wait in waits if wait.ours and not wait.function.endswith("HalfStep.step")]
    assert sorted({wait[1:] for wait in mine if not wait.reads_metrics}) == []
    # One read a step shows that the watch sees what there is.
    assert sorted({wait.step for wait in mine}) == list(range(FIRST, LAST + 1))
