"""Questions about documents from data sets, whose rows have the columns of SQuAD and HotpotQA on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsetrain.errors import DataError
from sparsetrain.evaluation.ruler.documents import Questions, hotpot, parsed, squad
from sparsetrain.evaluation.ruler.settings import QuestionSource

SPLIT = "validation"
"""Of a Hub dataset, by default: the one that RULER asks from."""


def squad_rows(source: QuestionSource, called: str) -> Questions:
    """The answerable questions of rows with ``question``, ``context`` and ``answers: {text: [...]}``; those with one
    ``title`` are of one article.

    Raises:
        DataError: the data set cannot be read, has other columns, or no questions.
    """
    return _read(source, called, "SQuAD: question, context, answers: {text: [...]}", _of_squad)


def hotpot_rows(source: QuestionSource, called: str) -> Questions:
    """The questions of rows with ``question``, ``answer`` and ``context: {title: [...], sentences: [[...]]}``.

    Raises:
        DataError: the data set cannot be read, has other columns, or no questions.
    """
    form = "HotpotQA: question, answer, context: {title: [...], sentences: [[...]]}"
    return _read(source, called, form, _of_hotpot)


def _of_squad(rows: Sequence[Mapping[str, Any]]) -> Questions:
    articles: dict[Any, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        asked = {"question": row["question"], "answers": [{"text": text} for text in row["answers"]["text"]]}
        # Without titles the documents are of one another's article as little as those of others.
        article = articles.setdefault(row.get("title") or row["context"], {})
        article.setdefault(row["context"], []).append(asked)
    data = [
        {"paragraphs": [{"context": context, "qas": asked} for context, asked in article.items()]}
        for article in articles.values()
    ]
    return squad({"data": data})


def _of_hotpot(rows: Sequence[Mapping[str, Any]]) -> Questions:
    content = []
    for row in rows:
        context = row["context"]
        pairs = zip(context["title"], context["sentences"], strict=True)
        content.append({"question": row["question"], "answer": row["answer"], "context": list(pairs)})
    return hotpot(content)


def _read(
    source: QuestionSource, called: str, form: str, parse: Callable[[Sequence[Mapping[str, Any]]], Questions]
) -> Questions:
    from sparsetrain.data.files import is_local
    from sparsetrain.data.sources import columns_of
    from sparsetrain.source_section import DataSource

    split = source.split or ("train" if is_local(source.path) else SPLIT)
    place = f"{called}: {source.path}"
    rows = DataSource(path=source.path, subset=source.subset, revision=source.revision, split=split)
    try:
        read = list(columns_of(rows))
    except DataError as error:
        raise DataError(f"{called}: {error}") from error
    return parsed(lambda: parse(read), place, form)
