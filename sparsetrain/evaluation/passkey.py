"""Passkey retrieval: does the model find a key hidden at some depth of a long prompt?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsetrain.data import Row, collate, passkey_prompt
from sparsetrain.data.batch import IGNORE
from sparsetrain.data.randomness import generator
from sparsetrain.errors import DataError
from sparsetrain.evaluation.result import PasskeyResult
from sparsetrain.evaluation.scoring import Place, deal, predictions, sum_over_ranks
from sparsetrain.recipe.schema import PasskeySection


@dataclass(frozen=True)
class Prompt:
    """A prompt with its answer, labelled on the answer, and the cell of the grid it belongs to."""

    row: Row
    length_index: int
    depth_index: int


class Passkey:
    """Passkey prompts on a grid of lengths and depths: the same for every model and every evaluation with one seed.

    A prompt is answered right when every token of the answer is the model's first choice after the prompt and the
    answer's earlier tokens. That is so exactly when greedy decoding writes the answer, and takes one forward pass.

    Raises:
        DataError: a length cannot hold the prompt.
    """

    def __init__(self, section: PasskeySection, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.trials = section.trials
        self.digits = section.digits
        self.lengths = sorted(set(section.lengths))
        self.depths = [0.5] if section.depths == 1 else np.linspace(0, 1, section.depths).tolist()
        self.groups = [group for index in range(len(self.lengths)) for group in self._groups(index, tokenizer, seed)]

    def num_forwards(self, world: int) -> int:
        """Forward passes of each rank."""
        return math.ceil(len(self.groups) / world)

    def measure(self, model: PreTrainedModel, place: Place) -> PasskeyResult:
        """Right answers by length and depth. Every rank makes equally many forward passes and gets the same result."""
        correct = torch.zeros(len(self.lengths), len(self.depths), dtype=torch.int64)
        for group, weight in deal(self.groups, place):
            batch = collate([prompt.row for prompt in group])
            ((logits, labels, documents),) = predictions(model, batch, place.device, num_chunks=1)
            wrong = set(documents[logits.argmax(-1) != labels].tolist())
            for index, prompt in enumerate(group):
                correct[prompt.length_index, prompt.depth_index] += weight * (index not in wrong)
            place.on_forward()
        return PasskeyResult(
            lengths=self.lengths,
            depths=self.depths,
            trials=self.trials,
            digits=self.digits,
            correct=sum_over_ranks(correct, place).tolist(),
        )

    def _groups(self, length_index: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[Prompt]]:
        """The prompts of one length, grouped so that a forward pass holds as many as fit into the greatest length."""
        length = self.lengths[length_index]
        prompts = []
        for depth_index, depth in enumerate(self.depths):
            for trial in range(self.trials):
                rng = generator(seed, "evaluation", length, depth_index, trial)
                try:
                    prompt = passkey_prompt(tokenizer, length, depth, rng, self.digits)
                except DataError as error:
                    raise DataError(f"eval.passkey.lengths: {error}") from error
                labels = prompt.input_ids.copy()
                labels[: prompt.answer_start] = IGNORE
                row = Row(prompt.input_ids, labels, [len(labels)], [f"passkey {prompt.key}"])
                prompts.append(Prompt(row, length_index, depth_index))
        fit = self.lengths[-1] // length
        return [prompts[start : start + fit] for start in range(0, len(prompts), fit)]
