"""Asynchronous saving: copy the state to host memory, write it in a thread, commit when all ranks are done.

A save begins and ends collectively, in :meth:`Saver.save` and in :meth:`Saver.poll`, which every step calls. In
between, each rank writes its own files without communication. Rank 0 then writes the manifest and renames the folder. A
checkpoint is therefore complete only if every rank has written its part; a failure on one rank fails the save on all.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsetrain.activity import activity
from sparsetrain.errors import CheckpointError
from sparsetrain.recipe.schema import CheckpointSection
from sparsetrain.training.checkpoints import engine_state, store
from sparsetrain.training.checkpoints.files import Block, write_blocks, write_text
from sparsetrain.training.checkpoints.manifest import STATE, rank_file
from sparsetrain.training.checkpoints.state import TrainState, random_state
from sparsetrain.training.distributed.launcher import ranks_of_this_host
from sparsetrain.training.memory.host import available_host_memory
from sparsetrain.world import World

SHARE_OF_HOST_MEMORY = 0.8
"""Fraction of available host memory that the copies of all ranks of a machine may use; beyond it, training waits."""
LAST_WORDS = 15.0
"""Seconds that a rank waits for its own part of a checkpoint after a failure, and rank 0 for the others': less than the
30 seconds that launchers leave a rank once the first has exited."""
GLANCE = 0.2
"""Seconds between two checks of a thread."""


@dataclass
class _Write:
    """A checkpoint that is being written."""

    step: int
    texts: dict[str, str]
    best: dict[str, Any] | None
    thread: threading.Thread | None = None
    parts: int = 0
    """Progress counter of the writer."""
    error: str | None = None

    def wrote(self) -> None:
        self.parts += 1
        if self.thread is None:
            activity.moved()

    def done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def join(self) -> None:
        """Wait for the writer, and report its progress to the other ranks as this rank's progress."""
        parts = -1
        while self.thread is not None and self.thread.is_alive():
            if self.parts != parts:
                parts = self.parts
                activity.moved()
            self.thread.join(GLANCE)


class Saver:
    """Writes the checkpoints of a run. All methods except :meth:`abandon` are collective.

    Args:
        engine: The DeepSpeed engine.
        folder: The folder of checkpoints.
        section: The recipe's ``checkpoint`` section.
        world: The ranks.
        say: Prints a line for the user.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        section: CheckpointSection,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.on_failure: Callable[[int], None] = lambda step: None
        """Called with the step whose checkpoint could not be written, if the recipe lets the run continue."""
        self.on_complete: Callable[[Path], None] = lambda checkpoint: None
        """Called with the folder of each checkpoint that is complete."""
        self._engine = engine
        self._folder = folder
        self._section = section
        self._world = world
        self._say = say
        self._write: _Write | None = None
        self._begun: int | None = None
        """Step of the last checkpoint that is complete or being written."""
        best = [store.read_best(folder) if world.main else None]
        dist.broadcast_object_list(best, src=0)
        self._best = best[0] if best[0] is not None and best[0]["metric"] == section.keep_best else None
        self._candidate: dict[str, Any] | None = None

    def check(self) -> str:
        """Check that checkpoints will hold every trained element exactly once; returns a line to print.

        Raises:
            CheckpointError: DeepSpeed keeps part of the state in an unexpected place.
        """
        held = sum(
            each.numel for block in engine_state.blocks(self._engine) for each in block.slices if each.kind == "weight"
        )
        counted = torch.tensor(held, dtype=torch.int64, device=self._world.device)
        dist.all_reduce(counted)
        trained = engine_state.trained_elements(self._engine)
        if counted.item() != trained:
            raise CheckpointError(
                f"checkpoints would hold {counted.item():,} of {trained:,} trained elements; a setting of "
                "deepspeed.config moves the optimizer's state to an unknown place"
            )
        return f"checkpoints hold each of the {trained:,} trained elements, whatever the number of ranks"

    def save(self, state: TrainState, documents: dict[str, str], wait: bool) -> None:
        """Begin a checkpoint; wait until it is complete if ``wait`` or the recipe says so.

        If the last one is of this step, it stays, and :meth:`is_best` may have made it the best.

        Args:
            documents: Small text files to save with the state (``recipe.yaml``, ``environment.json``).

        Raises:
            CheckpointError: The disk is full or not writable, and the recipe says stop; earlier checkpoints are intact.
        """
        if wait or self._begun != state.step:
            self.finish()
        if self._begun == state.step:
            self.keep_as_best()
            return
        partial, best = store.partial_of(self._folder, state.step), self._candidate
        self._candidate = None
        error = self._on_main(lambda: store.make_partial(partial))
        if error is not None:
            self._failed(state.step, error)
            return
        texts = {STATE: json.dumps({**asdict(state), **engine_state.counters(self._engine)}), **documents}
        write, self._begun = _Write(state.step, texts, best), state.step
        blocks, record = engine_state.blocks(self._engine), {"random": random_state()}
        wait = wait or not self._section.asynchronous
        if not wait and not self._fits(blocks):
            self._say("training waits for this checkpoint: host memory has no room for a copy of the state")
            wait = True
        if wait:
            self._write = write
            self._write_part(write, blocks, record)
            self.finish()
        else:
            arguments = (write, [block.copied() for block in blocks], record)
            write.thread = threading.Thread(
                target=self._write_part, args=arguments, name="sparsetrain-checkpoint", daemon=True
            )
            self._write = write
            write.thread.start()

    def poll(self) -> None:
        """Called after every step: commit the pending checkpoint once all ranks have written their parts.

        Raises:
            CheckpointError: It could not be written, and the recipe says stop.
        """
        if self._write is None:
            return
        if not self._world.largest(float(not self._write.done())):
            self._finish_write(self._write)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._write is not None:
            self._write.join()
            self._finish_write(self._write)

    def abandon(self) -> None:
        """Complete the pending checkpoint after the run has failed, without collective operations.

        Any thread may call it, because the main thread may be stuck.
        """
        write, self._write = self._write, None
        if write is None:
            return
        partial = store.partial_of(self._folder, write.step)
        records = [rank_file(partial, rank, "json") for rank in range(self._world.size)]
        mine = records if self._world.main else records[self._world.rank : self._world.rank + 1]
        deadline = time.monotonic() + LAST_WORDS
        while write.error is None and time.monotonic() < deadline:
            if all(record.is_file() for record in mine):
                if self._world.main:
                    with contextlib.suppress(OSError, CheckpointError):  # the run has already reported a worse error
                        self._commit(write)
                return
            time.sleep(GLANCE)

    def is_best(self, step: int, value: float) -> bool:
        """Whether an evaluation is the best so far (higher is better), so that its checkpoint is kept."""
        pending = self._write.best if self._write is not None else None
        if math.isnan(value) or any(value <= best["value"] for best in (self._best, pending) if best is not None):
            return False
        name = store.target_of(self._folder, step).name
        self._candidate = {"checkpoint": name, "metric": self._section.keep_best, "value": value}
        return True

    def keep_as_best(self) -> None:
        """Mark the last checkpoint as the best, after an evaluation that came behind it."""
        best, self._candidate = self._candidate, None
        if best is None:
            return
        if self._write is not None:
            self._write.best = best
            return

        def name_it() -> None:
            if store.fault(last := self._folder / best["checkpoint"]) is None:
                store.write_best(self._folder, best)
                store.prune(last, self._section.keep_last)

        error = self._on_main(name_it)
        if error is not None:
            self._say(f"warning: {self._folder / store.BEST} cannot be written: {error}")
        else:
            self._best = best

    def _write_part(self, write: _Write, blocks: list[Block], record: dict[str, Any]) -> None:
        """Write this rank's files; the record comes last, and marks the tensor file as complete."""
        partial, rank = store.partial_of(self._folder, write.step), self._world.rank
        try:
            record["file"] = write_blocks(rank_file(partial, rank, "safetensors"), blocks, write.wrote)
            write_text(rank_file(partial, rank, "json"), json.dumps(record))
        except Exception as error:  # a thread cannot raise; the next poll does
            write.error = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"

    def _finish_write(self, write: _Write) -> None:
        write.join()
        errors: list[Any] = [None] * self._world.size
        dist.all_gather_object(errors, write.error)
        # Not earlier: if a rank has died meanwhile, abandon() must still commit the files that all have written.
        self._write = None
        error = next((each for each in errors if each is not None), None)
        if error is None:
            error = self._on_main(lambda: self._commit(write))
        if error is not None:
            self._failed(write.step, error)
            return
        self._best = write.best or self._best
        self._say(f"checkpoint: {store.target_of(self._folder, write.step)}")
        self.on_complete(store.target_of(self._folder, write.step))

    def _commit(self, write: _Write) -> None:
        partial, target = store.partial_of(self._folder, write.step), store.target_of(self._folder, write.step)
        store.commit(partial, target, write.texts, self._world.size)
        if write.best is not None:
            store.write_best(self._folder, write.best)
        store.prune(target, self._section.keep_last)

    def _failed(self, step: int, error: str) -> None:
        self._begun = None
        if self._world.main:
            shutil.rmtree(store.partial_of(self._folder, step), ignore_errors=True)
        target = store.target_of(self._folder, step)
        what = f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched"
        if self._section.on_failure == "stop":
            raise CheckpointError(
                f"{what}. Free some space or make the folder writable, then continue with --resume; with "
                "checkpoint.on_failure: continue a run goes on and tries again"
            )
        self._say(f"warning: {what}; the run goes on, and the next checkpoint is tried as planned")
        self.on_failure(step)

    def _on_main(self, act: Callable[[], None]) -> str | None:
        """Run ``act`` on rank 0; every rank gets its error."""
        error: list[str | None] = [None]
        if self._world.main:
            try:
                act()
            except (OSError, CheckpointError) as fault:
                error[0] = str(fault)
        dist.broadcast_object_list(error, src=0)
        return error[0]

    def _fits(self, blocks: list[Block]) -> bool:
        """Whether the host memory has room for copies of the blocks of all ranks on this machine.

        All ranks decide before any of them copies: an existing copy would be counted twice.
        """
        copies = sum(block.nbytes for block in blocks) * ranks_of_this_host(self._world.size)
        return not self._world.largest(float(copies >= SHARE_OF_HOST_MEMORY * available_host_memory()))
