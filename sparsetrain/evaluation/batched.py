"""Tasks that are measured batch by batch: dealt to ranks, without the batches whose records a journal has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sparsetrain.evaluation.base import Task, TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsetrain.evaluation.journal import Part
    from sparsetrain.world import World

T = TypeVar("T")


class BatchedTask(Task):
    """A task whose inputs are batches that are measured one by one.

    It says what the batches are, what is measured of one, and what follows from all of them. Dealing them to ranks,
    counting forward passes and keeping what is finished, so that an evaluation goes on after a kill, are done for it
    (:class:`Dealt`). The result is the same on any number of ranks.
    """

    @abstractmethod
    def batches(self) -> Mapping[str, Sequence[Any]]:
        """The batches by group: dataclasses, arrays, tensors, numbers, texts, and lists and dicts of them.

        Ranks measure batches of one group at a time, so each batch of a group takes equally many forward passes, and
        equally many chunks of logits, as ZeRO-3 needs.
        """

    @abstractmethod
    def measure_batch(self, model: PreTrainedModel, batch: Any, world: World) -> Any:
        """What is measured of a batch, on this rank alone: a value that JSON has, with text as keys of dicts.

        Args:
            model: gone through :func:`sparsetrain.sparsify`, in evaluation mode, without gradients.
        """

    @abstractmethod
    def result(self, records: Mapping[str, Sequence[Any]]) -> TaskResult:
        """The result, from what was measured of each batch, in the groups and the order of :meth:`batches`."""

    def num_forwards(self, ranks: int) -> int:
        """A batch counts as one pass."""
        return sum(-(-len(batches) // ranks) for batches in self.batches().values())

    def measure(self, model: PreTrainedModel, world: World, on_forward: Callable[[], None]) -> TaskResult:
        """Measure all batches; nothing is kept."""
        from sparsetrain.evaluation.journal import Journal

        return Dealt(self, Journal().part("", "")).measure(model, world, on_forward)


class Dealt:
    """A task and the records of its finished batches.

    Args:
        kept: these records. Every rank has the same, so that all deal out the same batches.
    """

    def __init__(self, task: BatchedTask, kept: Part) -> None:
        from sparsetrain.evaluation.journal import digest

        self._task, self._kept = task, kept
        self._groups = {
            group: [(digest([group, batch]), batch) for batch in batches] for group, batches in task.batches().items()
        }

    def forwards_left(self, ranks: int) -> int:
        """Forward passes of each of so many ranks for what is not finished."""
        return sum(-(-len(self._left(group)) // ranks) for group in self._groups)

    def measure(self, model: PreTrainedModel, world: World, on_forward: Callable[[], None]) -> TaskResult:
        """Measure what is left, and return the result of all: the same on every rank, which make equally many passes.

        Args:
            on_forward: called after each batch.
        """
        for group in self._groups:
            for (key, batch), counts in deal(self._left(group), world):
                record = self._task.measure_batch(model, batch, world)
                if counts:
                    self._kept.add(key, record)
                on_forward()
        self._kept.journal.share(world)
        found = self._task.result(
            {group: [self._kept[key] for key, _ in batches] for group, batches in self._groups.items()}
        )
        return found if found.inputs else found.model_copy(update={"inputs": self._inputs()})

    def _inputs(self) -> str:
        """A digest of all batches."""
        from sparsetrain.evaluation.journal import digest

        return digest({group: [key for key, _ in batches] for group, batches in self._groups.items()})

    def _left(self, group: str) -> list[tuple[str, Any]]:
        return [(key, batch) for key, batch in self._groups[group] if key not in self._kept]


def deal(items: Sequence[T], world: World) -> list[tuple[T, bool]]:
    """The items of one rank, filled up so that all ranks have equally many; whether an item counts."""
    rounds = -(-len(items) // world.size)
    mine = range(world.rank, rounds * world.size, world.size)
    return [(items[index], True) if index < len(items) else (items[0], False) for index in mine]
