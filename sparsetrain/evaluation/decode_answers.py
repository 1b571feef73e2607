"""The answers that a model writes under a decode setting, and what its steps read and lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sparsetrain.counted import counted
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import ModelError
from sparsetrain.generation.measured import ELEMENT, MeasuredMemory, Step
from sparsetrain.generation.memories import make_memory
from sparsetrain.generation.observed import observing
from sparsetrain.generation.settings import Decode
from sparsetrain.generation.texts import left_padded, line_breaks, without_own_settings
from sparsetrain.modeling import set_decode
from sparsetrain.modeling.attention.plan import PLAN_ATTRIBUTE, LayerPlan
from sparsetrain.modeling.cache import MemoryLayer
from sparsetrain.modeling.layers import attention_density, sparse_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.data import Row

FREE = -1
"""In the place of a token that the model writes itself."""


@dataclass(frozen=True)
class Question:
    """A document with answers, cut into a prompt and what is read step by step."""

    prompt: list[int]
    """Tokens that are read at once, with full attention."""
    steps: list[int]
    """The tokens that follow; :data:`FREE` in answers."""
    answers: dict[int, list[int]]
    """The tokens of each answer by its first step."""

    @classmethod
    def of(cls, row: Row, read: int) -> Question:
        """The document of a row whose labels are its answers.

        Args:
            read: tokens before the first answer that are read step by step, so that they have to find it.

        Raises:
            ModelError: the document has fewer before them.
        """
        ids, labelled = row.input_ids.tolist(), (row.labels != IGNORE).tolist()
        starts = [place for place, inside in enumerate(labelled) if inside and not labelled[place - 1]]
        cut = starts[0] - read
        if cut < 1:
            raise ModelError(
                f"--question {read}: the first answer of {row.origin[0]} is behind {starts[0]} tokens; lower it below "
                "that, or make the documents longer"
            )
        ends = [next((at for at in range(start, len(ids)) if not labelled[at]), len(ids)) for start in starts]
        steps = [FREE if inside else token for token, inside in zip(ids[cut:], labelled[cut:], strict=True)]
        answers = {start - cut: ids[start:end] for start, end in zip(starts, ends, strict=True)}
        return cls(ids[:cut], steps, answers)

    def found(self, written: Sequence[int]) -> float:
        """The share of the answers that a text has."""
        right = [list(written[start : start + len(answer)]) == answer for start, answer in self.answers.items()]
        return sum(right) / len(right)


@dataclass
class Measured:
    """What was measured of one setting, over documents and steps."""

    found: list[float] = field(default_factory=list)
    """Share of right answers of each document."""
    lengths: list[int] = field(default_factory=list)
    """Tokens written from the answer on, with the one that ends it, of each document with one answer."""
    ended: list[bool] = field(default_factory=list)
    """Whether the model ended these."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Of each layer, fp64 ``[7]``: sums over the steps of all documents of the fields of
    :class:`~sparsetrain.generation.measured.Step`, in the mean over heads, and the number of steps."""

    def mean(self, name: str, layer: int | None = None) -> float:
        """The mean of a field of :class:`~sparsetrain.generation.measured.Step`, over all layers or of one."""
        chosen = [self.layers[layer]] if layer is not None else [*self.layers.values()]
        total = torch.stack(chosen).sum(0)
        return float(total[Step._fields.index(name)] / total[-1])

    def ended_length(self, *, right: bool) -> float | None:
        """The mean of :attr:`lengths` over the right or the wrong answers that the model ended; None without any."""
        texts = zip(self.lengths, self.ended, self.found, strict=True)
        chosen = [length for length, ended, found in texts if ended and (found == 1) == right]
        return sum(chosen) / len(chosen) if chosen else None


class _Dictated(LogitsProcessor):
    """Puts tokens of the document in the place of those that the model would write."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        wanted = self._tokens[:, input_ids.shape[1] - self._prompt, None]
        only = torch.full_like(scores, float("-inf")).scatter(1, wanted.clamp_min(0), 0.0)
        return scores.where(wanted == FREE, only)


class _AnswerEnd(StoppingCriteria):
    """Ends a text that has broken a line, or written a token that ends texts, in its answer."""

    def __init__(self, ends: Tensor, starts: Tensor) -> None:
        self._ends, self._starts = ends, starts

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.isin(input_ids[:, -1], self._ends) & (input_ids.shape[1] > self._starts)


def longest(questions: Sequence[Question], extra: int) -> int:
    """Tokens that a text has at most, with ``extra`` behind an answer where each document has one."""
    documents = max(len(question.prompt) + len(question.steps) for question in questions)
    return documents + (extra if _single(questions) else 0)


def _single(questions: Sequence[Question]) -> bool:
    return all(len(question.answers) == 1 for question in questions)


class Answerer:
    """A model that answers the questions of one task.

    Args:
        model: sparsified, in evaluation mode, on its device. It is left with all keys read.
        questions: all of the task.
        extra: tokens that may follow an answer, where a document has one.
        batch: documents at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        extra: int,
        batch: int,
    ) -> None:
        self.model, self.questions, self._batch = model, questions, batch
        self.longest = longest(questions, extra)
        """Tokens that a text has at most."""
        config: Any = model.config.get_text_config()
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        """Channels of a key."""
        self._single = _single(questions)
        self._extra = extra if self._single else 0
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        # Of documents with several answers none ends before its last token.
        ends = line_breaks(tokenizer) | {*([eos] if isinstance(eos, int) else eos or [])} if self._single else set()
        self._ends: set[int] = ends

    @torch.no_grad()
    def answer(
        self,
        decode: Decode | None,
        memory: type[MeasuredMemory] | None,
        *,
        first: int | None = None,
        on_batch: Callable[[int], None] = lambda documents: None,
    ) -> Measured:
        """Answer the questions under a decode setting.

        Args:
            memory: of the layers that take it. None, with no decode setting, reads what the model's attention reads;
                then only keys and bytes are measured, of layers that leave some out.
            first: so many questions; None means all.
            on_batch: called with the documents of each batch.

        Raises:
            ModelError: the section does not fit the model, or the device has too little memory.
        """
        measured = Measured()
        chosen = self.questions[:first]
        set_decode(self.model, decode)
        try:
            with without_own_settings(self.model):
                for start in range(0, len(chosen), self._batch):
                    part = chosen[start : start + self._batch]
                    self._answer(part, memory, measured)
                    on_batch(len(part))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.model.device} has too little memory for {counted(self._batch, 'document')}; lower --batch"
            ) from error
        finally:
            set_decode(self.model, None)
        return measured

    def _answer(self, questions: Sequence[Question], memory: type[MeasuredMemory] | None, measured: Measured) -> None:
        ids, mask = left_padded([question.prompt for question in questions])
        width = ids.shape[1]
        count = max(len(question.steps) for question in questions) + self._extra
        dictated = torch.full((len(questions), count), FREE)
        for row, question in enumerate(questions):
            dictated[row, : len(question.steps)] = torch.tensor(question.steps)
        device = self.model.device
        cache, memories = (DynamicCache(config=self.model.config), {}) if memory is None else self._cache(memory)
        stops = StoppingCriteriaList()
        if self._single:
            starts = torch.tensor([width + min(question.answers) for question in questions], device=device)
            stops.append(_AnswerEnd(torch.tensor(sorted(self._ends), device=device), starts))
        with observing():
            texts: Any = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0),
                logits_processor=LogitsProcessorList([_Dictated(dictated.to(device), width)]),
                stopping_criteria=stops,
            )
        written = [
            self._until_end(text, question) for text, question in zip(texts[:, width:].tolist(), questions, strict=True)
        ]
        for text, question in zip(written, questions, strict=True):
            measured.found.append(question.found(text))
            if self._single:
                measured.lengths.append(len(text) - min(question.answers))
                measured.ended.append(text[-1] in self._ends)
        # A text's last token is read for the others of the batch alone.
        read = torch.tensor([len(text) - 1 for text in written])
        if memory is None:
            prompts = torch.tensor([len(question.prompt) for question in questions])
            for index, sums in self._read_by_itself(prompts, read).items():
                measured.layers[index] = measured.layers.get(index, 0) + sums
        for index, steps in ((index, each.steps) for index, each in memories.items()):
            live = torch.arange(len(steps))[:, None] < read
            fields = [torch.stack(values).double() for values in zip(*steps, strict=True)]
            means = [values.mean(-1) if values.dim() == 3 else values for values in fields]
            sums = torch.stack([(values * live).sum() for values in means] + [live.sum().double()])
            measured.layers[index] = measured.layers.get(index, 0) + sums

    def _read_by_itself(self, prompts: Tensor, steps: Tensor) -> dict[int, Tensor]:
        """What steps read with the model's own attention, by layer, as in :attr:`Measured.layers`.

        Args:
            prompts: tokens before the first step, ``[B]``.
            steps: of each, ``[B]``.
        """
        config: Any = self.model.config.get_text_config()
        pair = 2 * self.width * ELEMENT * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        ends = (prompts + steps).tolist()
        seen = sum(end * (end + 1) - start * (start + 1) for start, end in zip(prompts.tolist(), ends, strict=True)) / 2

        def pairs(length: int) -> list[float]:
            return [share * length * (length + 1) / 2 for share in attention_density(self.model, length)]

        before, behind = ([pairs(length) for length in lengths] for lengths in (prompts.tolist(), ends))
        found = {}
        for place, share in enumerate(attention_density(self.model, self.longest)):
            if share < 1:
                keys = sum(end[place] - start[place] for start, end in zip(before, behind, strict=True))
                sums = {"keys": keys, "bytes": keys * pair, "length": seen, "dense_bytes": seen * pair}
                values = [sums.get(name, float("nan")) for name in Step._fields]
                found[place] = torch.tensor([*values, float(steps.sum())], dtype=torch.float64)
        return found

    def _until_end(self, text: list[int], question: Question) -> list[int]:
        """What was written, without what is behind the end, or was written for longer documents of the batch."""
        start = min(question.answers)
        text = text[: len(question.steps) + self._extra]
        ends = (at for at, token in enumerate(text) if at >= start and token in self._ends)
        return text[: next(ends, len(text)) + 1]

    def _cache(self, memory: type[MeasuredMemory]) -> tuple[DynamicCache, dict[int, MeasuredMemory]]:
        """An empty cache, and the memories that measure by layer."""
        cache = DynamicCache(config=self.model.config)
        memories: dict[int, MeasuredMemory] = {}
        for index, module, _ in sparse_layers(self.model):
            plan: LayerPlan = getattr(module, PLAN_ATTRIBUTE)
            if plan.decode is None:
                continue
            made: Any = make_memory(plan.method, plan.window, decode=plan.decode, index=index, listed=partial(memory))
            memories[index] = made
            place: Any = module.layer_idx
            cache.layers[place] = MemoryLayer(made, plan)
        return cache, memories
