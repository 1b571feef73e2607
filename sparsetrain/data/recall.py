"""Multi-query associative recall: key-value pairs early in the document, filler, and then every key again.

The task is MQAR of Zoology (2312.04927, section 3 and appendix C.1): ``k v`` pairs, and later ``k`` alone, with the
value as the answer. It consists of tokens, not of text, so that a model with a few hundred thousand parameters learns
it in minutes, and the keys that a method must keep are known exactly: the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsetrain.data.document import Tokens
from sparsetrain.data.encoding import opening
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Hint = Literal["mark", "question", "none"]

SYMBOLS = 64
"""Keys, values and filler tokens there are, of each kind; guessing one of the values is right once in as many."""


class Recall:
    """Builds the documents of the task from the tokens of one tokenizer.

    A document is BOS where the tokenizer puts one; the questions, if these are the hint; pairs of a key and its value,
    scattered over filler in the first half; filler; and the asked pairs again in a random order, with loss on the
    values. Keys, values, filler and the mark are disjoint sets of ordinary tokens, taken from the vocabulary at even
    distances.

    Args:
        keys: pairs that are asked for, each once.
        distractors: pairs of the same tokens that are never asked for.
        hint: how a document with distractors tells early which pairs matter. ``mark``: one token in front of each asked
            key, in its pair, so that it is known when the pair is read, but not from its tokens. ``question``: the
            document begins with the asked keys, each behind the mark, and pairs have none. ``none``: nothing tells
            before the questions at the end.

    Raises:
        DataError: more pairs than key tokens, or a vocabulary too small for three kinds and a mark.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, keys: int, distractors: int = 0, hint: Hint = "mark"
    ) -> None:
        if keys + distractors > SYMBOLS:
            raise DataError(
                f"keys={keys} and distractors={distractors}: the recall task has {SYMBOLS} tokens for keys, and each "
                "pair of a document needs one of its own"
            )
        ordinary = np.array(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
        if len(ordinary) < 3 * SYMBOLS + 1:
            raise DataError(
                f"the recall task needs {3 * SYMBOLS + 1} ordinary tokens; this tokenizer has {len(ordinary)}"
            )
        chosen = ordinary[np.linspace(0, len(ordinary) - 1, 3 * SYMBOLS + 1).astype(np.int64)]
        self._mark, kinds = chosen[0], chosen[1:].reshape(SYMBOLS, 3).T
        self._key_tokens, self._value_tokens, self._filler = kinds
        self._opening = np.array(opening(tokenizer), dtype=np.int64)
        self._keys, self._distractors = keys, distractors
        self._hint: Hint = hint if distractors else "none"

    def document(self, length: int, rng: np.random.Generator) -> Tokens:
        """One document of exactly ``length`` tokens, with a target span for each answer.

        Raises:
            DataError: the pairs do not fit into the first half of ``length`` tokens, or nothing would separate them
                from the questions.
        """
        keys = rng.choice(self._key_tokens, size=self._keys + self._distractors, replace=False)
        values = rng.choice(self._value_tokens, size=len(keys))
        pairs = [np.array([key, value]) for key, value in zip(keys, values, strict=True)]
        if self._hint == "mark":
            pairs[: self._keys] = [np.array([self._mark, *pair]) for pair in pairs[: self._keys]]
        beginning = self._opening
        if self._hint == "question":
            questions = [[self._mark, key] for key in keys[rng.permutation(self._keys)]]
            beginning = np.concatenate([beginning, *questions])
        first_half = length // 2 - len(beginning)
        early = first_half - sum(map(len, pairs))
        start = length - 2 * self._keys
        if early < 0 or start <= length // 2:
            raise DataError(
                f"a recall document of {length} tokens has no room for {self._keys} pairs and {self._distractors} "
                "distractors in its first half and the questions in its second; ask for longer documents or fewer pairs"
            )
        input_ids = rng.choice(self._filler, size=length)
        input_ids[: len(beginning)] = beginning
        # Fillers before each pair, and behind them the pairs before it.
        pairs = [pairs[index] for index in rng.permutation(len(pairs))]
        places = np.sort(rng.integers(0, early + 1, size=len(pairs))) + np.cumsum([0, *map(len, pairs[:-1])])
        for place, pair in zip(places + len(beginning), pairs, strict=True):
            input_ids[place : place + len(pair)] = pair
        asked = rng.permutation(self._keys)
        input_ids[start::2], input_ids[start + 1 :: 2] = keys[asked], values[asked]
        return Tokens(input_ids, [(answer, answer + 1) for answer in range(start + 1, length, 2)])
