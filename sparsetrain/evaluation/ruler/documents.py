"""Questions about documents (RULER's ``qa_1`` and ``qa_2``), from files in SQuAD's and HotpotQA's formats."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.essay import SENTENCE_END
from sparsetrain.evaluation.generative.fit import Maker, NoRoom, Room, Sample
from sparsetrain.textfile import text_lines

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEMPLATE = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\nQuestion: {{question}}"
)
PREFIX = " Answer:"
ENOUGH = 0.99
"""Share of its tokens from which on a prompt is full."""
ESTIMATES = 8
"""Attempts to fill one by estimates."""


@dataclass(frozen=True)
class Question:
    """A question and the documents around it, by their numbers."""

    text: str
    answers: list[str]
    """Paraphrases of the answer."""
    gold: list[int]
    """Documents that every prompt has."""
    near: list[int] = field(default_factory=list)
    """Documents of the same article, which come next."""


@dataclass(frozen=True)
class Questions:
    """The questions of a file."""

    questions: list[Question]
    documents: list[str]
    """Each once, in sorted order."""


class QuestionMaker(Maker):
    """Makes prompts of so many documents in random order, and a question.

    The units are documents. NVIDIA's scripts take whole ones; else one more, cut behind a sentence, fills the room.

    Args:
        order: draws the order of the questions; None asks them as the file has them.
        most: questions about the same documents.
    """

    step = 10

    def __init__(self, questions: Questions, order: Draws | None, most: int = 1) -> None:
        self._documents = questions.documents
        self.questions = questions.questions if order is None else order.shuffled(questions.questions)
        self._more = most - 1

    def trial(self, units: int, draws: Draws) -> Sample:
        """The first question."""
        return self.sample(0, units, draws)

    def sample(self, index: int, units: int, draws: Draws) -> Sample:
        """One question of the file, at least with the documents that it needs."""
        question = self.questions[index]
        numbers = self._chosen(question, max(units, len(question.gold)), draws)
        return self._prompt(question, draws.shuffled(self._documents[number] for number in numbers))

    def fitted(self, index: int, units: int, room: Room, draws: Draws) -> Sample:
        """One question of the file, with as many whole documents as fit, and the beginning of another one.

        Raises:
            NoRoom: the documents that it needs are too long.
        """
        if draws.mirror:
            return super().fitted(index, units, room, draws)
        question = self.questions[index]
        numbers = self._ordered(question, max(2 * units, len(question.gold)) + self.step, draws)
        # Where a text may end: behind each sentence of each document.
        ends: list[tuple[int, int]] = []
        sizes: list[int] = []
        before = 0
        for place, number in enumerate(numbers):
            own = _ends(self._documents[number])
            ends += [(place, end) for end in own]
            sizes += [before + end for end in own]
            before = sizes[-1]
        fewest = sum(len(_ends(self._documents[number])) for number in question.gold) - 1
        start = next((at for at, (place, _) in enumerate(ends) if place == units), len(ends)) - 1

        def documents(at: int) -> tuple[list[int], list[str]]:
            """The numbers of whole ones, and the texts of all."""
            place, end = ends[at]
            last = self._documents[numbers[place]]
            whole = numbers[: place + (end == len(last))]
            texts = draws.shuffled(self._documents[number] for number in whole)
            return whole, texts + ([last[:end]] if end < len(last) else [])

        at = _fullest(lambda at: room.count(self._prompt(question, documents(at)[1])), fewest, start, sizes, room)
        while True:
            whole, texts = documents(at)
            others = [self._prompt(each, texts) for each in self._others(question, whole, draws)]
            sample = replace(self._prompt(question, texts), others=others)
            # Another question may be longer.
            if at == fewest or not others or room.fits(room.count(sample)):
                return sample
            at -= 1

    def _others(self, question: Question, documents: Sequence[int], draws: Draws) -> list[Question]:
        """Other questions that these documents answer, as many as asked for."""
        if not self._more:
            return []
        known = {*documents}
        able = [each for each in self.questions if each is not question and known.issuperset(each.gold)]
        return draws.more.sample(able, min(self._more, len(able)))

    def _prompt(self, question: Question, texts: Sequence[str]) -> Sample:
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1))
        return Sample(TEMPLATE.format(context=context, question=question.text), PREFIX, question.answers)

    def _ordered(self, question: Question, count: int, draws: Draws) -> list[int]:
        """Numbers of documents: those that the question needs, of its article, and others, each in random order."""
        sample, known = draws.random.sample, {*question.gold, *question.near}
        near = sample(question.near, len(question.near))
        others = [number for number in range(len(self._documents)) if number not in known]
        every = question.gold + near + sample(others, min(count, len(others)))
        return (every * -(-count // len(every)))[:count]

    def _chosen(self, question: Question, count: int, draws: Draws) -> list[int]:
        """Numbers of documents as NVIDIA's scripts choose them."""
        gold, near, every = question.gold, question.near, range(len(self._documents))
        if count >= len(every):
            return (list(every) * -(-count // len(every)))[:count]
        if count - len(gold) <= len(near):
            return gold + draws.random.sample(near, count - len(gold))
        known = {*gold, *near}
        others = [number for number in every if number not in known]
        return gold + near + draws.random.sample(others, count - len(gold) - len(near))


def _ends(text: str) -> list[int]:
    """Where the sentences of a text end."""
    return [*(found.start() for found in SENTENCE_END.finditer(text)), len(text)]


def _fullest(count: Callable[[int], int], fewest: int, start: int, sizes: list[int], room: Room) -> int:
    """The greatest number whose tokens fit, or one that leaves little room.

    Args:
        count: the tokens of a number.
        fewest: the least number.
        start: a first guess.
        sizes: about in proportion to the tokens, by number, ascending.

    Raises:
        NoRoom: not even the least fits.
    """
    target = room.most - room.budget
    low, tokens, high, guess = fewest - 1, 0, len(sizes), max(start, fewest)
    for attempt in itertools.count(1):
        measured = count(guess)
        letters_a_token = sizes[guess] / measured
        if measured <= target:
            low, tokens = guess, measured
        elif guess == fewest:
            raise NoRoom(measured + room.budget + room.overhead)
        else:
            high = guess
        if high - low <= 1 or tokens >= ENOUGH * target:
            return low
        aim = bisect_right(sizes, sizes[guess] + (target - measured) * letters_a_token) - 1
        # The middle where estimates do not come to an end.
        guess = min(max(aim, low + 1), high - 1) if attempt < ESTIMATES else (low + high) // 2
    raise AssertionError("the search ends")


def read_squad(path: Path, called: str) -> Questions:
    """The answerable questions of a file in SQuAD's format (1.1 or 2.0).

    Raises:
        DataError: it cannot be read, has another format, or no questions.
    """
    return _read(path, called, "SQuAD: {data: [{paragraphs: [{context, qas: [{question, answers}]}]}]}", squad)


def read_hotpot(path: Path, called: str) -> Questions:
    """The questions of a file in HotpotQA's format (distractor).

    Raises:
        DataError: it cannot be read, has another format, or no questions.
    """
    return _read(path, called, "HotpotQA: [{question, answer, context: [[title, [sentences]]]}]", hotpot)


def _read(path: Path, called: str, form: str, parse: Callable[[Any], Questions]) -> Questions:
    place = f"{called}: {path}"
    text = "".join(text_lines(path, place, DataError))
    return parsed(lambda: parse(json.loads(text)), place, form)


def parsed(parse: Callable[[], Questions], place: str, form: str) -> Questions:
    """What a parser finds.

    Raises:
        DataError: the content has another form, or no questions.
    """
    try:
        questions = parse()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{place} is not in the format of {form} ({type(error).__name__}: {error})") from error
    if not questions.questions:
        raise DataError(f"{place} has no question with an answer")
    return questions


def squad(content: Any) -> Questions:
    """The questions of a file in SQuAD's format, read."""
    articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in content["data"]]
    documents = sorted({text for article in articles for text in article})
    numbers = {text: number for number, text in enumerate(documents)}
    questions = []
    for article in content["data"]:
        own = [numbers[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = numbers[paragraph["context"]]
            near = [number for number in own if number != gold]
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                if not asked.get("is_impossible", False) and answers:
                    questions.append(Question(_text(asked["question"]), [*map(_text, answers)], [gold], near))
    return Questions(questions, [*map(_text, documents)])


def hotpot(content: Any) -> Questions:
    """The questions of a file in HotpotQA's format, read."""
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in content]
    if not all(contexts):
        raise ValueError("a question without documents")
    documents = sorted({text for context in contexts for text in context})
    numbers = {text: number for number, text in enumerate(documents)}
    questions = [
        Question(_text(row["question"]), [_text(row["answer"])], [numbers[text] for text in context])
        for row, context in zip(content, contexts, strict=True)
    ]
    return Questions(questions, documents)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected a text, got {value!r}")
    return value
