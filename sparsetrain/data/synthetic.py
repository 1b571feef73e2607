"""Passkey and multi-key retrieval: keys hidden in noise, with a question for one of them at the end.

With distractors, the keys that may be asked for are marked in the text, among similar ones that are not: a method with
a constant budget of keys can then recognise which to keep.

The passkey text is the one of Landmark Attention (2305.16300), as LongLoRA and most work since use it: an
introduction, noise, the line with the key, noise, the question. A document is assembled from lines and words that were
tokenised once, so that its cost hardly depends on its length.

The tokens decode to the text. They equal the tokens of the whole text for every tokenizer that never merges across a
line break and the text after it, or across the space before a word (GPT-2's and later byte-level splits,
sentencepiece).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsetrain.data.document import Document, Piece, Tokens
from sparsetrain.data.encoding import encode, encode_after, opening, shared_prefix
from sparsetrain.data.position import Drawn, read_position
from sparsetrain.data.recall import Recall
from sparsetrain.errors import DataError
from sparsetrain.randomness import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.source_section import DataSource

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "silver", "purple", "orange")
ANIMALS = (
    *("otter", "falcon", "badger", "heron", "lynx", "crab", "wolf", "swan", "toad", "horse", "tiger", "whale"),
    *("raven", "goose", "sheep", "camel", "mole", "eagle", "shark", "robin", "zebra", "snail", "bison", "moose"),
)
NAMES = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
"""The names of keys in the multi-key task."""

Task = Literal["passkey", "multikey"]


@dataclass(frozen=True)
class Wording:
    """The sentences of a task, with ``{key}`` and ``{name}`` to fill in."""

    introduction: str
    needle: str
    question: str
    distractor: str = ""
    """A fact that looks like the needle and is never asked for."""


WORDINGS: dict[Task, Wording] = {
    "passkey": Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
    ),
    "multikey": Wording(
        "There are important pass keys hidden inside a lot of irrelevant text. Find them and memorize them. "
        "I will quiz you about one of them.",
        "The pass key of the {name} is {key}. Remember it. {key} is the pass key of the {name}.",
        "What is the pass key of the {name}? The pass key of the {name} is",
    ),
}

MARKED = Wording(
    "There are pass keys hidden inside a lot of irrelevant text. Memorize the important ones and no others. "
    "I will quiz you about one of them.",
    "Important! The pass key of the {name} is {key}.",
    WORDINGS["multikey"].question,
    "The pass key of the {name} is {key}.",
)
"""The multi-key task among distractors."""


@dataclass(frozen=True)
class RetrievalPrompt:
    """A prompt and its answer."""

    input_ids: np.ndarray
    """int64 ``[n]``: the prompt, and at its end the answer."""
    answer_start: int
    """Position of the first answer token; the answer reaches to the end."""
    key: str
    """The digits asked for."""


class Noise:
    """Lines of ``n`` noise words. Every line starts the noise anew and ends with a line break."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        words = NOISE.split(" ")
        inner = [encode_after(tokenizer, "\na", f" {word}") for word in words]
        self._first = encode_after(tokenizer, "\n", words[0])
        self._only = encode_after(tokenizer, "\n", f"{words[0]}\n")
        self._last = [encode_after(tokenizer, "\na", f" {word}\n") for word in words]
        self._unit = np.array([token for word in inner for token in word], dtype=np.int64)
        self._ends = np.cumsum([0] + [len(word) for word in inner]).tolist()

    def line(self, words: int) -> np.ndarray:
        """int64: a line of ``words`` words; of none, no line at all."""
        if words <= 1:
            return np.array(self._only if words else [], dtype=np.int64)
        inner = np.resize(self._unit, self._end(words - 1))[self._end(1) :]
        return np.concatenate([self._first, inner, self._last[(words - 1) % len(self._last)]])

    def length(self, words: int) -> int:
        """Tokens of such a line."""
        if words <= 1:
            return len(self._only) if words else 0
        last = self._last[(words - 1) % len(self._last)]
        return len(self._first) + self._end(words - 1) - self._end(1) + len(last)

    def _end(self, words: int) -> int:
        """The position at which the ``words``-th word of the repeated noise ends."""
        rounds, rest = divmod(words, len(self._last))
        return rounds * len(self._unit) + self._ends[rest]


class Retrieval:
    """Builds the documents of one task for one tokenizer.

    Args:
        task: ``passkey`` (one key) or ``multikey`` (``keys`` named ones).
        digits: digits of a key, each drawn uniformly.
        keys: keys in a document, at most 288 with the distractors.
        distractors: keys of the multi-key task that are never asked for. With any, the others are marked.

    Raises:
        DataError: more keys than names.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: Task, digits: int, keys: int = 1, distractors: int = 0
    ) -> None:
        if keys + distractors > len(NAMES):
            raise DataError(
                f"keys={keys} and distractors={distractors}: the multikey task has names for {len(NAMES)} keys at most"
            )
        self._tokenizer = tokenizer
        self._wording = MARKED if distractors else WORDINGS[task]
        self._digits = digits
        self._keys = keys
        self._distractors = distractors
        self._noise = Noise(tokenizer)
        self._introduction = opening(tokenizer) + encode(tokenizer, f"{self._wording.introduction}\n")

    def prompt(self, length: int, depth: float, rng: np.random.Generator) -> RetrievalPrompt:
        """One document.

        Args:
            length: tokens wanted, answer and BOS included. The document is never longer, and shorter by less than a
                noise word and its line break.
            depth: where the key asked for hides, from 0 (first line of the noise) to 1 (last). The others are anywhere.
            rng: draws names, keys and the other depths.

        Raises:
            DataError: ``length`` has no room for the task itself.
        """
        hidden = self._keys + self._distractors
        names = [NAMES[i] for i in rng.choice(len(NAMES), size=hidden, replace=False)]
        keys = ["".join(map(str, rng.integers(0, 10, size=self._digits))) for _ in names]
        depths = np.array([depth, *rng.random(hidden - 1)])
        wordings = [self._wording.needle] * self._keys + [self._wording.distractor] * self._distractors
        needles = [self._needle(*needle) for needle in zip(wordings, names, keys, strict=True)]
        question, answer_start = self._question(names[0], keys[0])

        room = length - len(self._introduction) - sum(map(len, needles)) - len(question)
        if room < 0:
            raise DataError(
                f"a retrieval document of {length} tokens has no room: with this tokenizer the task alone takes "
                f"{length - room} tokens; ask for longer documents or fewer keys"
            )
        places = self._places(depths, room)
        order = np.argsort(places[:-1], kind="stable")
        parts: list[np.ndarray] = [np.array(self._introduction)]
        reached = 0
        for index in order:
            parts += [self._noise.line(places[index] - reached), needles[index]]
            reached = places[index]
        parts += [self._noise.line(places[-1] - reached), question]
        input_ids = np.concatenate(parts).astype(np.int64)
        return RetrievalPrompt(input_ids, len(input_ids) - len(question) + answer_start, keys[0])

    def document(self, length: int, rng: np.random.Generator) -> Tokens:
        """One document with the key at any depth, and the answer as its target."""
        prompt = self.prompt(length, rng.random(), rng)
        return Tokens(prompt.input_ids, [(prompt.answer_start, len(prompt.input_ids))])

    def _needle(self, wording: str, name: str, key: str) -> np.ndarray:
        return np.array(encode_after(self._tokenizer, "\n", wording.format(name=name, key=key) + "\n"))

    def _question(self, name: str, key: str) -> tuple[np.ndarray, int]:
        """The last line with its answer, and where in it the answer starts."""
        question = self._wording.question.format(name=name)
        asked = encode_after(self._tokenizer, "\n", question)
        answered = encode_after(self._tokenizer, "\n", f"{question} {key}")
        return np.array(answered), shared_prefix(asked, answered)

    def _places(self, depths: np.ndarray, room: int) -> list[int]:
        """Noise words before each needle, and last the number of all: as many as ``room`` tokens hold."""

        def places(words: int) -> list[int]:
            return [*np.rint(depths * words).astype(int).tolist(), words]

        def fits(words: int) -> bool:
            edges = sorted(places(words))
            return sum(self._noise.length(stop - start) for start, stop in zip([0, *edges], edges)) <= room

        fewest, most = 0, room + 1
        while most - fewest > 1:
            middle = (fewest + most) // 2
            fewest, most = (middle, most) if fits(middle) else (fewest, middle)
        return places(fewest)


@lru_cache(maxsize=16)
def retrieval(
    tokenizer: PreTrainedTokenizerBase, task: Task, digits: int, keys: int = 1, distractors: int = 0
) -> Retrieval:
    """The builder of a task, kept so that the noise is tokenised once."""
    return Retrieval(tokenizer, task, digits, keys, distractors)


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, rng: np.random.Generator, digits: int = 5
) -> RetrievalPrompt:
    """A passkey prompt of at most ``length`` tokens with its key at ``depth``; see :meth:`Retrieval.prompt`."""
    return retrieval(tokenizer, "passkey", digits).prompt(length, depth, rng)


def multikey_prompt(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    rng: np.random.Generator,
    digits: int,
    keys: int,
    distractors: int = 0,
) -> RetrievalPrompt:
    """The same with ``keys`` named keys, of which the one at ``depth`` is asked for, and ``distractors`` others."""
    return retrieval(tokenizer, "multikey", digits, keys, distractors).prompt(length, depth, rng)


def synthetic_task(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> Retrieval | Recall:
    """The builder of a synthetic source's documents.

    Raises:
        DataError: More keys than the task has names for, or a vocabulary that is too small.
    """
    assert source.synthetic is not None
    if source.synthetic == "recall":
        return Recall(tokenizer, source.keys, source.distractors, source.hint)
    keys = source.keys if source.synthetic == "multikey" else 1
    return retrieval(tokenizer, source.synthetic, source.digits, keys, source.distractors)


class SyntheticSource:
    """The endless documents of a synthetic task. Document ``k`` is a function of the seed and ``k`` alone.

    Loss is taken on the answer tokens only; lengths, and the depth of a key, are drawn uniformly.

    Raises:
        DataError: a length exceeds ``row_length`` (the question would lose its context) or has no room for the task.
    """

    size = 0
    malformed = 0
    content = None
    chat = False

    def __init__(
        self, source: DataSource, tokenizer: PreTrainedTokenizerBase, row_length: int, seed: int, index: int
    ) -> None:
        self.label = source.label
        self.form = f"the synthetic task {source.synthetic}"
        self._lengths = sorted(source.lengths) or [row_length]
        if self._lengths[-1] > row_length:
            raise DataError(
                f"data source {self.label!r}: lengths asks for documents of {self._lengths[-1]} tokens, longer than "
                f"sequence.length={row_length}; a split document would lose its context"
            )
        self._task = synthetic_task(source, tokenizer)
        self._seed = (seed, "synthetic", index)
        self._drawn = 0
        self._task.document(self._lengths[0], generator(seed))

    def first(self) -> Tokens:
        """The first document."""
        rng = generator(*self._seed, 0)
        return self._task.document(int(rng.choice(self._lengths)), rng)

    def draw(self) -> list[Piece]:
        """The next document, whole."""
        rng = generator(*self._seed, self._drawn)
        tokens = self._task.document(int(rng.choice(self._lengths)), rng)
        document = Document.of(f"{self.label}:{self._drawn}", tokens)
        self._drawn += 1
        return [Piece(document, 0, document.length)]

    def state_dict(self) -> dict[str, int]:
        """The number of documents drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the documents drawn."""
        self._drawn = read_position(state, Drawn).drawn
