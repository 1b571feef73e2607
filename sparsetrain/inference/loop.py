"""Generation whose steps are one CUDA graph: what ``model.generate`` writes, without the host's work for each kernel.

transformers prepares everything (inputs, logits processors, stopping criteria) and hands it to a loop of ours, by its
argument ``custom_generate``. The loop is that of its greedy search and sampling, token for token: prompt and first step
run as they are, the second step is captured, the others replay it. Processors, choice and criteria run between the
graphs. The host reads one flag a step, and has all work of the step queued before it waits for it.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from sparsetrain.errors import ModelError
from sparsetrain.generation.pages import check_room
from sparsetrain.inference.captured_step import CapturedStep
from sparsetrain.modeling import SparseCache
from sparsetrain.modeling.cache import UNUSED
from sparsetrain.modeling.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

logger = logging.getLogger(__name__)

NO_CONFIG = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "trust_remote_code"),
    *("tokenizer", "assistant_tokenizer", "generation_config"),
)
"""Arguments of ``generate`` that are no field of a generation config and no input of the model."""


def generate(
    model: Any, inputs: Tensor | None = None, *, streamer: BaseStreamer | None = None, **arguments: Any
) -> Any:
    """``model.generate`` with steps that are replayed as a CUDA graph: the same tokens, many times as fast where the
    host is what steps wait for.

    For greedy search and sampling with a :class:`~sparsetrain.SparseCache`. Anything else runs in transformers' own
    loops, and a warning says why: beams, guesses (an assistant, prompt lookup), stop strings, models whose step cannot
    be captured. On a CPU steps are run as they are. A cache that serves another batch of the
    same shape (``cache.reset()``) keeps its graph.

    Args:
        model: a sparsified model.
        inputs: token ids, int64 ``[B, N]``, padded on the left; or pass ``input_ids=`` or ``inputs_embeds=``.
        streamer: is handed each token while the next one is computed.
        arguments: of ``model.generate``, ``past_key_values=sparsetrain.SparseCache(model, max_length=...)`` among them.

    Returns:
        What ``model.generate`` returns: token ids int64 ``[B, N + new]``, or with ``return_dict_in_generate`` an object
        of transformers.

    Raises:
        ModelError: the text grows beyond the cache, ``use_cache=False`` beside a cache, a ``prefill_chunk_size``
            below 1, or as the model's attention says.
    """
    if arguments.get("past_key_values") is not None:
        if arguments.get("use_cache") is False:
            raise ModelError(UNUSED)
        # The model's config may say otherwise.
        arguments = {**arguments, "use_cache": True}
    reason = why_not(model, arguments)
    if reason is not None:
        logger.warning("steps run in transformers' own loop: %s", reason)
        return model.generate(inputs, streamer=streamer, **arguments)
    return replay(model, inputs, streamer=streamer, **arguments)


def replay(model: Any, inputs: Tensor | None = None, *, streamer: BaseStreamer | None = None, **arguments: Any) -> Any:
    """As :func:`generate`, with token ids int64 ``[B, N]``, for arguments that :func:`why_not` has nothing against."""
    # transformers hands a streamer to its own loops only.
    loop = partial(_write, streamer=streamer)
    return model.generate(inputs, streamer=streamer, **{**arguments, "custom_generate": loop, "disable_compile": True})


def why_not(model: Any, arguments: dict[str, Any]) -> str | None:
    """Why steps cannot be captured for these arguments of :func:`generate`; None where they can, as far as is known
    before the model runs."""
    cache = arguments.get("past_key_values")
    if not isinstance(cache, SparseCache):
        return "past_key_values is no SparseCache"
    if not cache.is_compileable:
        return "some layer's memory changes on the host with every step"
    if len({each.device for each in model.parameters()}) > 1:
        return "the model's weights are on several devices"
    if is_sharded(model):
        return "the model's weights are shared out over ranks (ZeRO-3)"
    for name in ("custom_generate", "assistant_model", "synced_gpus"):
        if arguments.get(name):
            return name
    own = {name: value for name, value in arguments.items() if name not in NO_CONFIG}
    config: GenerationConfig = model._prepare_generation_config(arguments.get("generation_config"), **own)[0]
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')}"
    for name in ("stop_strings", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            return name
    return None


def _check_parts(tokens: Any) -> None:
    """transformers splits a prompt by it unchecked."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ModelError(
            f"prefill_chunk_size={tokens!r}: expected the tokens of a part of the prompt, at least 1; or leave it out"
        )


@torch.no_grad()
def _write(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """As ``_sample`` of transformers."""
    config: Any = generation_config
    _check_parts(config.prefill_chunk_size)
    texts: Any = input_ids  # of a type of transformers' own
    pad: Any = None if config._pad_token_tensor is None else config._pad_token_tensor.to(texts.device)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    keeps = {
        name: config.return_dict_in_generate and getattr(config, name) for name in ("output_scores", "output_logits")
    }
    scores: Any = () if keeps["output_scores"] else None
    raw: Any = () if keeps["output_logits"] else None
    unfinished = torch.ones(texts.shape[0], dtype=torch.long, device=texts.device)
    stop = _Stop(stopping_criteria, streamed=streamer is not None)
    steps: _Steps | None = None

    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    whole = texts.shape[1] if mask is None else mask.shape[1]
    with cache.reading(whole - int(cache.get_seq_length())):
        outputs = model._prefill(texts, generation_config, model_kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1]
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    del outputs
    optimized = getattr(model, "_optimize_model_for_decode", nullcontext)
    try:
        with optimized():
            while True:
                # A copy: processors may write in it, and a step overwrites the logits of the one before.
                copied: Any = logits.to(copy=True, dtype=torch.float32, device=texts.device)
                del logits
                chosen = logits_processor(texts, copied)
                if scores is not None:
                    scores += (chosen,)
                if raw is not None:
                    raw += (copied,)
                if config.do_sample:
                    tokens = torch.multinomial(torch.softmax(chosen, dim=-1), num_samples=1).squeeze(1)
                else:
                    tokens = torch.argmax(chosen, dim=-1)
                if ends:
                    tokens = tokens * unfinished + pad * (1 - unfinished)
                texts = torch.cat([texts, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~stopping_criteria(texts, scores)
                if steps is not None:
                    # Before the host waits.
                    steps.take(tokens)
                written, is_done = stop(tokens, unfinished, texts.shape[1])
                if not is_done:
                    steps = steps or _Steps(model, cache, model_kwargs)
                    logits = steps(texts, tokens)
                if streamer is not None:
                    # While the device computes the next one.
                    streamer.put(written)
                if is_done:
                    break
    finally:
        if steps is not None:
            steps.finish()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return texts
    return GenerateDecoderOnlyOutput(sequences=texts, scores=scores, logits=raw, past_key_values=cache)


class _Stop:
    """Tells the host whether all rows have ended, and what was written, by one copy a step.

    Args:
        streamed: the tokens are wanted too.
    """

    def __init__(self, criteria: StoppingCriteriaList, *, streamed: bool) -> None:
        # Then the length alone decides, and nothing is waited for.
        self._free = all(type(each) is MaxLengthCriteria for each in criteria) and not streamed
        self._most = criteria.max_length
        self._copy: Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def __call__(self, tokens: Tensor, unfinished: Tensor, length: int) -> tuple[Tensor, bool]:
        """The tokens, int64 ``[B]``, on the host where they are wanted there, and whether all rows have ended.

        Args:
            tokens: int64 ``[B]``.
            unfinished: 1 for rows that go on, int64 ``[B]``.
            length: tokens of a row.
        """
        if self._free and self._most is not None:
            return tokens, length >= self._most
        told = torch.cat([tokens, unfinished.max().reshape(1)])
        if told.is_cuda:
            if self._copy is None or self._there is None:
                self._copy, self._there = torch.empty_like(told, device="cpu", pin_memory=True), torch.cuda.Event()
            self._copy.copy_(told, non_blocking=True)
            self._there.record()
            self._there.synchronize()
            # A streamer may keep what it is handed.
            told = self._copy.clone()
        return told[:-1], not bool(told[-1])


class _Steps:
    """The steps behind a prompt: as a graph from the second one on, or, if that is not possible, one by one."""

    def __init__(self, model: Any, cache: SparseCache, model_kwargs: dict[str, Any]) -> None:
        self._model, self._cache, self._kwargs = model, cache, model_kwargs
        self._step: CapturedStep | None = None
        self._captured, self._plain = False, False
        self._read = int(cache.get_seq_length())

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

    def finish(self) -> None:
        """No step follows."""
        if self._step is not None:
            self._step.finish()

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
