"""Receptive field: what a linear probe finds in the last token's states, by layer and block (2503.03588, 4.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsetrain.evaluation.base import TaskSection
from sparsetrain.evaluation.batched import BatchedTask
from sparsetrain.evaluation.receptive_field.result import FieldMap, ReceptiveFieldResult
from sparsetrain.section import MOST_LISTED, Bounds, Tokens
from sparsetrain.source_section import ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.receptive_field.prompts import Prompt
    from sparsetrain.world import World


class ReceptiveFieldSection(TaskSection):
    """Receptive field by layer and block: does the last token's hidden state tell which digit stood in a block?"""

    result = ReceptiveFieldResult
    writes = False

    task: Literal["receptive_field"] = "receptive_field"
    """Receptive field by layer and block: a linear probe."""
    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)]
    """Tokens of a prompt."""
    blocks: Annotated[int, Field(gt=0), Bounds(1024, "each has prompts of its own, at every length")] = 8
    """Equal parts of a prompt, in each of which the key stands in some of them."""
    samples: Annotated[int, Field(gt=0, multiple_of=40), Bounds(10**5, "each is a prompt, in every block")] = 120
    """Prompts for each length and block, a multiple of 40. They are in 4 parts, each with as many prompts of each of
    10 digits. Classifiers that are fitted to three parts name the digits of the fourth."""

    def lengths_by_field(self) -> dict[str, Sequence[int]]:
        """The prompts."""
        return {"lengths": self.lengths}

    def try_inputs(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The shortest prompt."""
        from sparsetrain.evaluation.receptive_field.prompts import Prompts

        with self.blaming("lengths"):
            Prompts(tokenizer, min(*self.lengths, ROOM))

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> ReceptiveField:
        """All prompts."""
        return ReceptiveField(self, tokenizer, seed)


@dataclass(frozen=True)
class Cell:
    """A prompt, and the block that its key is in."""

    prompt: Prompt
    block: int


class ReceptiveField(BatchedTask):
    """Prompts by length and block, each digit in equally many: the same for every model and evaluation with one seed.

    Raises:
        DataError: a length cannot hold the prompt, or the tokenizer has no tokens for digits.
    """

    def __init__(self, section: ReceptiveFieldSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.section, self.seed = section, seed
        self.lengths = sorted(set(section.lengths))
        self.groups = {length: self._groups(length, tokenizer) for length in self.lengths}

    def _groups(self, length: int, tokenizer: PreTrainedTokenizerBase) -> list[list[Cell]]:
        from sparsetrain.evaluation.receptive_field.prompts import DIGITS, Prompts
        from sparsetrain.randomness import generator

        with self.section.blaming("lengths"):
            prompts = Prompts(tokenizer, length)
        cells = []
        for block in range(self.section.blocks):
            for index in range(self.section.samples):
                rng = generator(self.seed, "receptive_field", length, block, index)
                depth = (block + rng.random()) / self.section.blocks
                cells.append(Cell(prompts.make(index % DIGITS, depth, rng), block))
        fit = self.lengths[-1] // length
        return [cells[start : start + fit] for start in range(0, len(cells), fit)]

    def batches(self) -> dict[str, list[list[list[Any]]]]:
        """As many prompts at a time as fit into the greatest length."""
        return {
            str(length): [[[*cell.prompt, cell.block] for cell in group] for group in groups]
            for length, groups in self.groups.items()
        }

    def measure_batch(self, model: PreTrainedModel, batch: list[list[Any]], world: World) -> dict[str, Any]:
        """The states of each prompt by layer, and what the layers can know."""
        import numpy as np
        import torch

        from sparsetrain.data import Row, collate
        from sparsetrain.data.batch import IGNORE
        from sparsetrain.evaluation.receptive_field.probe import exact_field, last_states, pack_states
        from sparsetrain.evaluation.scoring import logits_at

        tokens = [sample[0] for sample in batch]
        # Plain text, for methods that let a prompt attend fully.
        labels = [np.where(np.arange(len(each)) > 0, each, IGNORE) for each in tokens]
        rows = collate([Row(each, mine, [len(each)], [""]) for each, mine in zip(tokens, labels, strict=True)])
        ends = (rows.cu_seqlens[1:].long() - 1).to(world.device)
        with last_states(model, ends) as found:
            for _ in logits_at(model, rows, world.device, ends, num_chunks=1):
                pass
        states = torch.stack(found, dim=1)
        field = exact_field(model, len(tokens[0]))
        known = None if field is None else [_known(*field, places=sample[2]) for sample in batch]
        return {
            "layers": len(found),
            "states": [pack_states(each) for each in states],
            "known": known,
            "field": None if field is None else field[1].mean(axis=1).tolist(),
        }

    def result(self, records: Mapping[str, Sequence[dict[str, Any]]]) -> ReceptiveFieldResult:
        """Classifiers of each layer and block, and their control."""
        maps = {length: self._map(self.groups[length], records[str(length)]) for length in self.lengths}
        return ReceptiveFieldResult(maps=maps, blocks=self.section.blocks, samples=self.section.samples)

    def _map(self, groups: list[list[Cell]], records: Sequence[dict[str, Any]]) -> FieldMap:
        import numpy as np
        import torch

        from sparsetrain.evaluation.receptive_field.probe import accuracy, unpack_states
        from sparsetrain.evaluation.receptive_field.prompts import DIGITS
        from sparsetrain.randomness import generator

        cells = [cell for group in groups for cell in group]
        packed = [state for record in records for state in record["states"]]
        exact = records[0]["field"] is not None
        known = np.array([each for record in records for each in record["known"]]) if exact else None
        layers = records[0]["layers"]
        found, control, reached = [], [], []
        for block in range(self.section.blocks):
            own = [index for index, cell in enumerate(cells) if cell.block == block]
            states = torch.from_numpy(np.stack([unpack_states(packed[index], layers) for index in own], axis=1))
            labels = np.array([cells[index].prompt.digit for index in own])
            mixed = generator(self.seed, "receptive_field control", block).permutation(labels)
            found.append(accuracy(states, torch.from_numpy(labels), DIGITS, self.seed).tolist())
            control.append(accuracy(states, torch.from_numpy(mixed), DIGITS, self.seed).tolist())
            if known is not None:
                reached.append(known[own].mean(axis=0).tolist())
        by_layer = [list(map(list, zip(*cells_of, strict=True))) for cells_of in (found, control, reached)]
        return FieldMap(
            accuracy=by_layer[0],
            control=by_layer[1],
            reached=by_layer[2] if exact else None,
            field=records[0]["field"],
        )


def _known(pattern: Any, reach: Any, *, places: list[int]) -> list[bool]:
    """Whether the last token depends on one of these positions, by layer."""
    found: list[bool] = reach[:, [place // pattern.block for place in places]].any(axis=1).tolist()
    return found
