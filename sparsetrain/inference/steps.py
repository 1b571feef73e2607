"""The steps of a generation: the first is run as it is, the second is captured, the others replay it."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from sparsetrain.generation.pages import check_room
from sparsetrain.inference.captured_step import CapturedStep
from sparsetrain.modeling import SparseCache

logger = logging.getLogger(__name__)


class Steps:
    """The steps behind a prompt: as a graph from the second one on, or, if that is not possible, one by one.

    Args:
        model: a sparsified model.
        cache: holds the prompt.
        model_kwargs: what ``model`` takes, as its generation keeps it from step to step.
    """

    def __init__(self, model: Any, cache: SparseCache, model_kwargs: dict[str, Any]) -> None:
        self._model, self._cache, self._kwargs = model, cache, model_kwargs
        self._step: CapturedStep | None = None
        self._captured, self._plain = False, False
        self._read = int(cache.get_seq_length())

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        """No step follows."""
        if self._step is not None:
            self._step.finish()

    def __call__(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """The logits behind the last tokens.

        Args:
            input_ids: int64 ``[B, N]``, the texts so far.
            tokens: int64 ``[B]``, the last of them.

        Returns:
            ``[B, vocabulary]``; the next step may overwrite them.
        """
        self._read += 1
        if self._step is not None and self._captured:
            check_room(self._read, self._cache.max_length)
            return self._step.run()
        inputs = self._model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self._kwargs)
        if self._plain:
            return self._go_on(self._model(**inputs, return_dict=True))
        if self._step is None:
            held: CapturedStep | None = self._cache.captured
            if held is not None and held.start_again(inputs):
                self._step, self._captured = held, True
                held.take(tokens)
                return held.run()
            # Its memory is free for another one.
            self._cache.captured = held = None
            self._step = CapturedStep(self._model, self._cache, inputs)
            return self._go_on(self._step.run_plainly())
        if reason := self._capture(self._step, inputs):
            logger.warning("steps run one by one: %s", reason)
            self._step, self._plain = None, True
            return self._go_on(self._model(**inputs, return_dict=True))
        return self._step.run()

    def take(self, tokens: Tensor) -> None:
        """Hand over the tokens that the next step will read, if there is one, int64 ``[B]``."""
        if self._step is not None:
            self._step.take(tokens)

    def _go_on(self, outputs: Any) -> Tensor:
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs, is_encoder_decoder=False)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _capture(self, step: CapturedStep, inputs: dict[str, Any]) -> str | None:
        """Make the graph of the steps; the reason where there is none."""
        if not step.goes_on(inputs):
            return f"{type(self._model).__name__} takes other inputs in every step than a token and its position"
        try:
            step.capture()
        # Whatever a model does that a graph cannot hold, it runs without one.
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            return f"a step of {type(self._model).__name__} cannot be captured ({type(error).__name__}: {lines[0]})"
        self._captured = True
        self._cache.captured = step
        return None
