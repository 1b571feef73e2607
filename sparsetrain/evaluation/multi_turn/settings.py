"""What a recipe says of questions in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparsetrain.errors import ModelError
from sparsetrain.evaluation.generative.settings import GenerativeSection
from sparsetrain.section import MOST_LISTED, Bounds, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MultiTurnSettings(GenerativeSection):
    """The settings of the task ``multi_turn``."""

    lengths: Annotated[list[Tokens], Field(min_length=1, max_length=MOST_LISTED)] = [4096, 8192, 16384, 32768]
    """Tokens of a whole conversation: the text, all questions, and the most that answers may have."""
    samples: Annotated[int, Field(gt=0), Bounds(10_000, "each is a conversation of its own, of every length")] = 25
    """Conversations of each length."""
    turns: Annotated[int, Field(gt=0), Bounds(100, "each is answered before the next one is asked", least=2)] = 5
    """Questions of a conversation."""
    keys: Annotated[int, Field(gt=0), Bounds(10_000, "each is a sentence of the text", least=2)] = 20
    """Keys whose numbers the text tells. Questions are about different ones, in random order."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """More questions than keys."""
        yield from super().faults()
        if self.turns > self.keys:
            yield "turns", f"{self.turns} questions are about different keys, and {self.path('keys')} is {self.keys}"

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model whose cache does not go on with another question."""
        from sparsetrain.inference.cached import AUTO, make_cache

        try:
            make_cache(model, max(self.lengths), AUTO)
        except ModelError as error:
            raise ModelError(f"eval.tasks.{self.label} asks several questions of one cache: {error}") from error
