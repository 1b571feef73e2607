"""What attention loses by the keys that a method leaves out, by layer, beside oracles of equal size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.errors import DataError, ModelError
from sparsetrain.evaluation.attention_error.result import AttentionErrorResult, LayerError
from sparsetrain.evaluation.base import TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.section import MOST_LISTED, Bounds, Tokens
from sparsetrain.source_section import DataSource

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.world import World


class AttentionErrorSection(TaskSection):
    """Attention error by layer: how much of full attention's softmax weight the keys that a method reads hold, and the
    error of its output, beside the best keys of equal number."""

    result = AttentionErrorResult
    writes = False
    instead_of_decode = (
        "attention_error is of one pass over a text, and decode settings choose keys in the steps behind one: "
        "sparsetrain compare-decode measures the error of such steps, beside oracles of as many bytes"
    )

    task: Literal["attention_error"] = "attention_error"
    """Attention error by layer."""
    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)]
    """Tokens of a window of text."""
    source: DataSource
    """Held-out documents, read in order."""
    windows: Annotated[int, Field(gt=0), Bounds(1000, "each is a forward pass")] = 4
    """Windows of each length."""
    rows: Annotated[int, Field(gt=0), Bounds(65536, "each is compared with full attention, in every layer")] = 64
    """Tokens of a window that are compared, in its second half: one is drawn of each of so many equal parts."""
    bos: bool = False
    """Put BOS before every window, as its first token."""

    @classmethod
    def suggested(cls, lengths: list[int]) -> dict[str, Any]:
        """The sources of Python's library that no shipped recipe trains on."""
        return {"lengths": lengths, "source": {"path": "python-stdlib", "split": "validation"}}

    def faults(self) -> Iterator[tuple[str, str]]:
        """More rows than the second half of a window has tokens."""
        yield from super().faults()
        if self.source.synthetic is not None:
            yield "source.synthetic", "attention error is measured on text, not on a synthetic task; give path"
        least = min(self.lengths)
        if 2 * self.rows > least:
            yield "rows", f"the second half of a window of {least} tokens has no {self.rows}; give at most {least // 2}"

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The windows."""
        return {"lengths": self.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whether there is the BOS that is asked for."""
        if self.bos and tokenizer.bos_token_id is None:
            raise DataError(f"{self.path('bos')}: the tokenizer has no BOS token; leave it out")

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a method that does not say which keys a token reads."""
        from sparsetrain.modeling import sparse_layers

        for _, _, method in sparse_layers(model):
            if method is not None and not method.says_keys_read:
                raise ModelError(
                    f"{self.path('task')}: {type(method).__name__} does not say which keys a token reads (it has "
                    "no keys_read), so they cannot be compared; leave the task out, or define it"
                )

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> AttentionError:
        """The windows of text, and the rows."""
        return AttentionError(self, tokenizer, seed)


@dataclass(frozen=True)
class Window:
    """A window of text, int64 ``[length]``, and the rows that are compared, int64 ``[R]``."""

    tokens: np.ndarray
    rows: np.ndarray


class AttentionError(BatchedTask):
    """Windows of one text at each length: the same text and rows for every model with one tokenizer and seed.

    Raises:
        DataError: the source cannot be read, or is too short.
    """

    def __init__(self, section: AttentionErrorSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        import numpy as np

        from sparsetrain.data.tokens import held_out_tokens
        from sparsetrain.randomness import generator

        section.try_inputs(tokenizer)
        self.section = section
        lengths = sorted(set(section.lengths))
        text = held_out_tokens(section.source, tokenizer, section.windows * (lengths[-1] - section.bos))
        self.digest = text.digest
        prefix = [tokenizer.bos_token_id] if section.bos else []
        self.windows: dict[int, list[Window]] = {}
        for length in lengths:
            room, middle = length - len(prefix), length // 2
            edges = np.linspace(middle, length, section.rows + 1).astype(np.int64)
            self.windows[length] = []
            for index in range(section.windows):
                rng = generator(seed, "attention_error", length, index)
                tokens = np.array([*prefix, *text.input_ids[index * room : (index + 1) * room]], dtype=np.int64)
                # Drawn, since evenly spaced ones can have one place in all blocks, or one distance to a choice.
                self.windows[length].append(Window(tokens, rng.integers(edges[:-1], edges[1:])))

    def batches(self) -> dict[str, list[Window]]:
        """A window at a time, by length."""
        return {str(length): windows for length, windows in self.windows.items()}

    def measure_batch(self, model: PreTrainedModel, batch: Window, world: World) -> dict[str, dict[str, float]]:
        """Means over rows and heads, by layer."""
        import torch

        from sparsetrain.data import Row, collate
        from sparsetrain.data.batch import IGNORE
        from sparsetrain.evaluation.attention_error.rows import compared
        from sparsetrain.evaluation.scoring import logits_at

        labels = batch.tokens.copy()
        labels[0] = IGNORE
        row = collate([Row(batch.tokens, labels, [len(labels)], [""])])
        with compared(model, torch.from_numpy(batch.rows).to(world.device)) as found:
            for _ in logits_at(model, row, world.device, torch.tensor([0], device=world.device), num_chunks=1):
                pass
        return {str(layer): means for layer, means in found.items()}

    def result(self, records: Mapping[str, Sequence[dict[str, dict[str, float]]]]) -> AttentionErrorResult:
        """Means over windows, by length and layer."""
        return AttentionErrorResult(
            layers={length: _means(records[str(length)]) for length in self.windows},
            before={
                length: sum(float(window.rows.mean()) + 1 for window in windows) / len(windows)
                for length, windows in self.windows.items()
            },
            rows=self.section.rows,
            windows=self.section.windows,
            source=self.section.source.label,
            digest=self.digest,
        )


def _means(records: Sequence[dict[str, dict[str, float]]]) -> list[LayerError]:
    """The mean of windows, by layer."""
    means = []
    for layer in records[0]:
        found = [record[layer] for record in records]
        fields = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
        means.append(LayerError(layer=int(layer), **fields))
    return means
