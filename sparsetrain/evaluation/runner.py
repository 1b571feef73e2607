"""Run the tasks of an ``eval`` section on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING

import torch

from sparsetrain.evaluation.base import Task
from sparsetrain.evaluation.batched import BatchedTask, Dealt
from sparsetrain.evaluation.journal import Journal
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.modeling.modes import in_evaluation_mode
from sparsetrain.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import EvalSection


def make_inputs(section: EvalSection, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> dict[str, Task]:
    """The tasks of :func:`evaluate` by label, with all inputs. A mistake stops a run before training, not after it.

    Raises:
        RecipeError, DataError: as :func:`evaluate` would.
    """
    return {task.label: task.build(tokenizer, seed) for task in section.tasks}


def told_work(inputs: Mapping[str, Task], ranks: int) -> str:
    """``64 forward passes (perplexity 24, passkey 40)``: what each of so many ranks does in one evaluation."""
    passes = {name: task.num_forwards(ranks) for name, task in inputs.items()}
    each = ", ".join(f"{name} {count:,}" for name, count in passes.items())
    total = sum(passes.values())
    return f"{total:,} forward {'pass' if total == 1 else 'passes'} ({each})"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    world: World,
    *,
    seed: int = 0,
    inputs: Mapping[str, Task] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
    first: EvalResult | None = None,
) -> EvalResult:
    """Run the tasks of an ``eval`` section.

    With several ranks the work is dealt out and the records are gathered over the default process group. Every rank
    runs equally many forward passes, as ZeRO-3 needs, and returns the same result.

    Args:
        model: gone through :func:`sparsetrain.sparsify` (method ``full`` for dense attention). It is put into
            evaluation mode, and afterwards back into the mode it was in.
        seed: of generated inputs; held-out text is read in order.
        inputs: of :func:`make_inputs` with the same section, tokenizer and seed, for several evaluations; by default
            they are made here.
        on_progress: called with the forward passes done and to do, on this rank; those that are not needed, because the
            journal has their records, count as done from the beginning.
        journal: keeps finished batches. A task whose measuring is its own (no ``BatchedTask``) is measured whole.
        first: the first result of the run, or of the rows that are compared: some tasks measure the same as it did
            (:meth:`~sparsetrain.evaluation.base.Task.follow`). That of rank 0 holds for all ranks.

    Raises:
        RecipeError: a length does not fit the tokens to score.
        DataError: the held-out source is too short, or a length cannot hold the synthetic task.
        ModelError: a task cannot be measured with the model.
    """
    journal = journal or Journal()
    if world.size > 1:
        first = world.on_main(lambda: first)
    followed = {} if first is None else first.tasks
    tasks: dict[str, Task | Dealt] = {}
    total = left = 0
    for each in section.tasks:
        each.check_model(model)
        # What a task keeps while it measures is of one evaluation.
        task = each.build(tokenizer, seed) if inputs is None else copy(inputs[each.label])
        if each.label in followed:
            task.follow(followed[each.label])
        forwards = task.num_forwards(world.size)
        total, left = total + forwards, left + forwards
        tasks[each.label] = task
        if isinstance(task, BatchedTask):
            tasks[each.label] = dealt = Dealt(task, journal.part(each.label, each.model_dump_json()))
            left += dealt.forwards_left(world.size) - forwards
    done = total - left
    if done and on_progress is not None:
        on_progress(done, total)

    def on_forward() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    # no_grad and not inference_mode: ZeRO-3 swaps parameter data in forward, which inference tensors forbid.
    with in_evaluation_mode(model), torch.no_grad():
        return EvalResult(tasks={name: task.measure(model, world, on_forward) for name, task in tasks.items()})
