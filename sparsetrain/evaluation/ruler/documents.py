"""Questions about documents (RULER's ``qa_1`` and ``qa_2``), from files in SQuAD's and HotpotQA's formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.fit import Maker, Sample
from sparsetrain.textfile import text_lines

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEMPLATE = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\nQuestion: {{question}}"
)
PREFIX = " Answer:"


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

    Args:
        order: draws the order of the questions; None asks them as the file has them.
    """

    step = 10

    def __init__(self, questions: Questions, order: Draws | None) -> None:
        self._documents = questions.documents
        self.questions = questions.questions if order is None else order.shuffled(questions.questions)

    def trial(self, units: int, draws: Draws) -> Sample:
        """The first question."""
        return self.sample(0, units, draws)

    def sample(self, index: int, units: int, draws: Draws) -> Sample:
        """One question of the file, at least with the documents that it needs."""
        question = self.questions[index]
        chosen = draws.shuffled(self._chosen(question, max(units, len(question.gold)), draws))
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, start=1))
        return Sample(TEMPLATE.format(context=context, question=question.text), PREFIX, question.answers)

    def _chosen(self, question: Question, count: int, draws: Draws) -> list[str]:
        every, gold, near = self._documents, question.gold, question.near
        if count >= len(every):
            return (every * -(-count // len(every)))[:count]
        if count - len(gold) <= len(near):
            numbers = gold + draws.random.sample(near, count - len(gold))
        else:
            known = {*gold, *near}
            others = [number for number in range(len(every)) if number not in known]
            numbers = gold + near + draws.random.sample(others, count - len(gold) - len(near))
        return [every[number] for number in numbers]


def read_squad(path: Path, called: str) -> Questions:
    """The answerable questions of a file in SQuAD's format (1.1 or 2.0).

    Raises:
        DataError: it cannot be read, has another format, or no questions.
    """
    return _read(path, called, "SQuAD: {data: [{paragraphs: [{context, qas: [{question, answers}]}]}]}", _squad)


def read_hotpot(path: Path, called: str) -> Questions:
    """The questions of a file in HotpotQA's format (distractor).

    Raises:
        DataError: it cannot be read, has another format, or no questions.
    """
    return _read(path, called, "HotpotQA: [{question, answer, context: [[title, [sentences]]]}]", _hotpot)


def _read(path: Path, called: str, form: str, parse: Callable[[Any], Questions]) -> Questions:
    place = f"{called}: {path}"
    text = "".join(text_lines(path, place, DataError))
    try:
        questions = parse(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{place} is not in the format of {form} ({type(error).__name__}: {error})") from error
    if not questions.questions:
        raise DataError(f"{place} has no question with an answer")
    return questions


def _squad(content: Any) -> Questions:
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


def _hotpot(content: Any) -> Questions:
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
