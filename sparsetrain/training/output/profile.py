"""A trace of some steps by torch's profiler (``train.profile``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sparsetrain.recipe.schema import ProfileSection


class StepProfiler:
    """Profiles the steps of ``train.profile`` on this rank, and writes ``profile-000010-000012.json.gz``, which
    Perfetto (ui.perfetto.dev) and Chrome read.

    Args:
        folder: The run folder.
        say: Prints a line for the user.
    """

    def __init__(self, section: ProfileSection, folder: Path, say: Callable[[str], None]) -> None:
        self._first, self._last = section.steps
        self._folder, self._say = folder, say
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Called before ``step`` (1 is the first)."""
        if step == self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """Called after ``step``; writes the trace after the last one."""
        if step == self._last and self._profile is not None:
            self._write(self._profile, step)

    def close(self, step: int) -> None:
        """Called when training is over, after ``step``; writes what was recorded of steps that it has not reached."""
        if self._profile is not None:
            self._write(self._profile, step)
        elif step < self._first:
            self._say(f"no profile: training ended with step {step}, before step {self._first} (train.profile)")

    def _write(self, recorded: profile, last: int) -> None:
        self._profile = None
        recorded.stop()
        file = self._folder / f"profile-{self._first:06d}-{last:06d}.json.gz"
        try:
            recorded.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            self._say(f"warning: {file} cannot be written ({error}); the run continues without it")
            return
        self._say(f"profile of steps {self._first} to {last}: {file}")
