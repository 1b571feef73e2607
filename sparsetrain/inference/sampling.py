"""The choice of the next token: greedy or sampled, by the user's settings or the model's ``generation_config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from sparsetrain.errors import ModelError
from sparsetrain.section import Section

if TYPE_CHECKING:
    from transformers import GenerationConfig

UNANSWERED = {
    "num_return_sequences": "several answers to a prompt",
    "stop_strings": "texts that end an answer",
    "max_time": "a limit of seconds",
    "token_healing": "prompts whose last token is changed",
    "penalty_alpha": "contrastive search",
    "dola_layers": "contrasting layers",
    "num_beam_groups": "groups of beams",
    "constraints": "constrained beams",
    "force_words_ids": "constrained beams",
}
"""Fields of a model's generation config that ``sparsetrain generate`` has no answer for."""

GUESSES = ("prompt_lookup_num_tokens", "assistant_early_exit")
"""Fields by which tokens are guessed, of one row alone."""

DRAWS = ("top_k", "top_p", "min_p")
"""Settings that only mean something where tokens are drawn."""


def _divisor(number: float) -> float:
    if 0 < number < 1e-6:
        raise ValueError("logits divided by less than 1e-6 overflow; raise it")
    return number


def check_own(own: GenerationConfig, *, batch: int) -> None:
    """Refuse what a model's generation config says and ``sparsetrain generate`` would not do; its kind of cache, which
    changes no token, is left out.

    Args:
        batch: prompts at a time.

    Raises:
        ModelError: names the field.
    """
    place = "generation_config.json of the model"
    for name, what in UNANSWERED.items():
        if (value := getattr(own, name, None)) is not None and value != 1:
            raise ModelError(f"{place}: {name}={value!r:.60}: this command has no {what}; remove the field there")
    if own.do_sample and own.temperature == 0:
        raise ModelError(f"{place}: temperature=0 with do_sample divides by zero; set do_sample to false there")
    for name in ("temperature", "repetition_penalty"):
        try:
            _divisor(getattr(own, name, None) or 0)
        except ValueError as error:
            raise ModelError(f"{place}: {name}={getattr(own, name)}: {error}") from error
    guesses = next((name for name in GUESSES if getattr(own, name, None) is not None), None)
    if guesses is not None and batch > 1:
        raise ModelError(
            f"{place}: {guesses} guesses tokens of one prompt at a time; set --batch 1, or remove it there"
        )


class Sampling(Section):
    """Settings of one token's choice. What is None is the model's own."""

    temperature: Annotated[float, Field(ge=0), AfterValidator(_divisor)] | None = None
    """0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Draw from the k likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Field(gt=0), AfterValidator(_divisor)] | None = None
    """Above 1: make tokens that were there before less likely."""

    def arguments(self, own: GenerationConfig) -> dict[str, Any]:
        """The arguments of ``model.generate``.

        Args:
            own: the model's generation config.

        Raises:
            ModelError: temperature 0 together with a setting of drawn tokens.
        """
        given = self.model_dump(exclude_none=True)
        draws = [name for name in DRAWS if name in given]
        if self.temperature == 0 and draws:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in draws)
            raise ModelError(f"--temperature 0 takes the likeliest token, so {flags} would have no effect; drop one")
        if self.temperature is None and not draws:
            return given
        if self.temperature == 0:
            del given["temperature"]
            # None, because transformers warns of values in the model's config that have no effect.
            return given | {"do_sample": False, "temperature": None, **dict.fromkeys(DRAWS)}
        return given | {"do_sample": True}

    def describe(self, own: GenerationConfig) -> str:
        """The choice in words, such as ``sampling (temperature 0.7, top_p 0.9)``."""
        merged = {**own.to_dict(), **self.arguments(own)}
        beams = merged.get("num_beams") or 1
        penalty = merged.get("repetition_penalty") or 1
        penalised = "" if penalty == 1 else f", repetition_penalty {penalty:g}"
        if not merged.get("do_sample"):
            return ("greedy" if beams == 1 else f"{beams} beams") + penalised
        names = ("temperature", *DRAWS)
        shown = [f"{name} {merged[name]:g}" for name in names if merged.get(name) is not None]
        return (f"sampling ({', '.join(shown)})" if shown else "sampling") + penalised
