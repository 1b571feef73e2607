"""The interface of an evaluation task: its config (a recipe section), its inputs, and its results.

A task is one file in ``tasks/`` with three classes, and one line in ``registry.py``. Nothing else names it: the schema,
the checks before a run, the loop, ``checkpoint.keep_best``, the report and the pictures go through what is declared
here. Importing a task loads neither torch nor numpy: a recipe is read without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sparsetrain.errors import DataError
from sparsetrain.evaluation.interval import wilson_interval
from sparsetrain.section import Section
from sparsetrain.source_section import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data.batch import Row
    from sparsetrain.world import World

PICTURES_OF_A_RUN = ("report", "loss", "attention", "selection")
"""Pictures that every run draws. Those of a task have its name."""

Rows = list[list[str]]
"""A table as text, its header first."""


def _usable(name: str) -> str:
    if name in PICTURES_OF_A_RUN or name.endswith("_loss"):
        raise ValueError(f"{name} is the name of another picture or metric of the run; choose another name")
    return name


TaskName = Annotated[str, Field(max_length=64, pattern="^[a-z_][a-z0-9_]*$"), AfterValidator(_usable)]
"""A name in metrics, in ``checkpoint.keep_best`` and on the command line (``eval.tasks.NAME.lengths=[4096]``)."""


class TaskSection(Section, ABC):
    """An entry of ``eval.tasks``: a task and its settings."""

    result: ClassVar[type[TaskResult]]
    """The kind of task."""

    pair_fields: ClassVar[tuple[str, ...]] = ()
    """The fields with a source whose rows are pairs of a preferred and a rejected answer."""

    writes: ClassVar[bool] = True
    """Whether the model may write texts, in steps that follow its decode section. Otherwise the task measures the same
    under every decode setting."""

    other_models: ClassVar[tuple[str, ...]] = ()
    """The fields that may name a model which is loaded beside the one that is measured, whole on each rank."""

    instead_of_decode: ClassVar[str] = ""
    """For a task that does not write: what measures decode settings in its place, where something does."""

    task: str
    name: TaskName | None = None
    """Its name in metrics, tables and ``checkpoint.keep_best``; by default the task's. Two tasks of one kind need
    different names."""

    @property
    def label(self) -> str:
        """The name that is used."""
        return self.name or self.task

    @classmethod
    def source_fields(cls) -> list[str]:
        """The fields that hold a source of documents."""
        return [name for name, info in cls.model_fields.items() if info.annotation is DataSource]

    def sources(self) -> dict[str, DataSource]:
        """The sources of documents, by field. Their first rows are looked at before a run."""
        return {name: getattr(self, name) for name in self.source_fields()}

    @classmethod
    def suggested(cls, lengths: list[int]) -> dict[str, Any]:
        """The settings with which ``sparsetrain eval --tasks NAME`` measures where no recipe has the task.

        Args:
            lengths: in tokens, ascending.
        """
        return {"lengths": lengths} if "lengths" in cls.model_fields else {}

    def path(self, name: str) -> str:
        """A field as messages call it: ``eval.tasks.passkey.lengths``."""
        return f"eval.tasks.{self.label}.{name}"

    def faults(self) -> Iterator[tuple[str, str]]:
        """Values that contradict one another: the field to blame, and a sentence."""
        yield from self.repeated(*(name for name in self.lengths_by_field() if name in type(self).model_fields))
        for name, source in self.sources().items():
            if source.weight != 1.0:
                yield (
                    f"{name}.weight",
                    f"weight={source.weight:g} has no effect here: it belongs to a mixture; this is one source",
                )

    def repeated(self, *names: str) -> Iterator[tuple[str, str]]:
        """Faults of lists that have something twice, which would be measured once."""
        for name in names:
            values = getattr(self, name)
            for value, count in Counter(values if isinstance(values, list) else ()).items():
                if count > 1:
                    yield name, f"has {value} {count} times; each is measured once, so give it once"

    @abstractmethod
    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """Sequence lengths in tokens, by the field that sets them; memory and kernels must support them."""

    @abstractmethod
    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the smallest of the inputs, where no row of a file is needed: before a model is loaded, without torch.

        Raises:
            DataError: there is no room, or what is asked for does not exist. It names the field (:meth:`blaming`).
        """

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Task:
        """All inputs, made: the same for every model and every evaluation with one seed.

        Raises:
            RecipeError, DataError: they cannot be made.
        """

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot be measured so, before it is trained or measured; by default none.

        Args:
            model: gone through :func:`sparsetrain.sparsify`; it may have no weights (on the meta device).

        Raises:
            ModelError: names the task, and why.
        """

    @contextmanager
    def blaming(self, name: str) -> Iterator[None]:
        """Put the path of a field before what is said of the data."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.path(name)}: {error}") from error

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if get_origin(cls.model_fields["task"].annotation) is Literal:
            lacking = sorted(cls.__abstractmethods__) + ([] if hasattr(cls, "result") else ["result"])
            if lacking:
                raise TypeError(f"{cls.__name__} defines a task but lacks {', '.join(lacking)}")


def without_steps(tasks: Iterable[TaskSection]) -> str:
    """Tasks that measure the same under every decode setting, and what measures such settings in their place."""
    found = list(tasks)
    names = ", ".join(task.label for task in found)
    return "; ".join([f"{names}, which write no texts", *filter(None, (task.instead_of_decode for task in found))])


class Task(ABC):
    """The inputs of a task, and the evaluation of a model on them."""

    @abstractmethod
    def num_forwards(self, ranks: int) -> int:
        """Forward passes of each of so many ranks."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, world: World, on_forward: Callable[[], None]) -> TaskResult:
        """Measure a model. Every rank makes equally many forward passes, as ZeRO-3 needs, and gets the same result.

        Args:
            model: gone through :func:`sparsetrain.sparsify`, in evaluation mode, without gradients.
            on_forward: to be called after each forward pass.
        """

    def follow(self, first: TaskResult) -> None:
        """What the first evaluation of a run, or the first row of a comparison, gave for the task of this name: called
        before anything is measured. Where inputs depend on a model, those of the first are for all."""
        return None

    def answered(self) -> list[Row] | None:
        """One row for each document whose labels are the answers that a model should write; None where the task has no
        answers. ``sparsetrain compare-decode`` has them written under decode settings."""
        return None


@dataclass(frozen=True)
class TaskReport:
    """How results are presented on the console and in ``report.md``."""

    title: str
    """The title of the table on the console."""
    heading: str
    """The heading of the section in ``report.md``."""
    about: str
    """An explanation of the numbers: a paragraph in ``report.md``."""
    rows: Rows
    """A row for each result."""
    shares: bool = False
    """Whether the cells are percentages, which are coloured."""
    details: Mapping[str, Rows] = field(default_factory=dict)
    """More tables by title: one for each result, titled by its label, or any others."""
    details_heading: str = ""
    """What the headings of these tables say behind their titles."""


@dataclass(frozen=True)
class Drawing:
    """A picture of results."""

    draw: Callable[[Any], None]
    """Draws into matplotlib axes, or for a result that is :attr:`TaskResult.wide` into a figure."""
    width: float
    height: float
    """Inches as a picture of its own."""
    panels: Sequence[Callable[[Any], None]] = ()
    """Of a result that is :attr:`TaskResult.wide`: draw the same into axes, one after the other, for a page on which
    they are pictures of their own. Without them the page has a picture of each result."""


@dataclass(frozen=True)
class LossMarks:
    """Evaluations in the curve of the training loss."""

    label: str
    points: list[tuple[int, float, str]]
    """Step, loss in nats per token, and the number beside it."""


class Share(NamedTuple):
    """A share of right answers, and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, share: float, asked: int) -> Self:
        """A share of so many prompts, with Wilson's interval. Where prompts can be right in part it is too wide rather
        than too narrow."""
        return cls(share, *wilson_interval(share * asked, asked))


class TaskResult(BaseModel, ABC):
    """The result of a task, serialisable as JSON."""

    # A diverged model measures inf or nan, which plain JSON has no number for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    wide: ClassVar[bool] = False
    """The picture has several axes side by side: a row of ``report.png``, and a file of its own, ``NAME.png``."""

    task: str
    inputs: str = ""
    """Equal for equal inputs: results of other prompts, texts or tokens do not compare. Empty where it is not known: of
    a task whose measuring is its own, and in files that were written without it."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Flat numbers, by what follows ``eval/NAME`` in their names: nothing, ``_loss``, or ``/`` and a part."""

    @abstractmethod
    def score(self) -> float:
        """One number, higher where the model is better: ``checkpoint.keep_best`` goes by it."""

    @classmethod
    @abstractmethod
    def report(cls, results: Mapping[str, Self]) -> TaskReport:
        """Results by label, as tables."""

    @classmethod
    def drawing(cls, name: str, results: Mapping[str, Self], trained_length: int | None) -> Drawing | None:
        """Results by label, as a picture; None where tables say it all.

        Args:
            name: of the task, which says nothing new where it is the default.
            trained_length: tokens of a training row.
        """
        return None

    def accuracy_by_length(self) -> Mapping[int, Share]:
        """The share of right answers by length in tokens, which ``report.html`` draws; none by default."""
        return {}

    @classmethod
    def loss_marks(cls, name: str, lines: Sequence[Mapping[str, Any]]) -> LossMarks | None:
        """Points to draw on the axis of the training loss.

        Args:
            name: The name of the task.
            lines: The lines of ``metrics.jsonl``.
        """
        return None

    @classmethod
    def ending(cls, name: str) -> str:
        """The suffix of titles that distinguishes tasks of one kind; empty for the default name."""
        return "" if name == cls.model_fields["task"].default else f": {name}"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        of_one_task = get_origin(cls.model_fields["task"].annotation) is Literal
        if of_one_task and cls.__abstractmethods__:
            lacking = ", ".join(sorted(cls.__abstractmethods__))
            raise TypeError(f"{cls.__name__} is the result of a task but lacks {lacking}")
