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
from sparsetrain.inference.steps import Steps
from sparsetrain.modeling import SparseCache
from sparsetrain.modeling.cache_hooks import UNUSED
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
    scores: Any = () if config.return_dict_in_generate and config.output_scores else None
    raw: Any = () if config.return_dict_in_generate and config.output_logits else None
    unfinished = torch.ones(texts.shape[0], dtype=torch.long, device=texts.device)
    stop = _Stop(stopping_criteria, streamed=streamer is not None)
    cache = model_kwargs["past_key_values"]
    logits, model_kwargs = _read_prompt(model, texts, generation_config, model_kwargs)
    optimized = getattr(model, "_optimize_model_for_decode", nullcontext)
    with Steps(model, cache, model_kwargs) as steps, optimized():
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
            steps.take(tokens)  # before the host waits
            written, is_done = stop(tokens, unfinished, texts.shape[1])
            if not is_done:
                logits = steps(texts, tokens)
            if streamer is not None:
                streamer.put(written)  # while the device computes the next one
            if is_done:
                break
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return texts
    return GenerateDecoderOnlyOutput(sequences=texts, scores=scores, logits=raw, past_key_values=cache)


def _read_prompt(
    model: Any, texts: Any, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The logits behind a prompt, ``[B, vocabulary]``, and what the model takes in the next step."""
    cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    whole = texts.shape[1] if mask is None else mask.shape[1]
    with cache.reading(whole - int(cache.get_seq_length())):
        outputs = model._prefill(texts, config, model_kwargs, is_first_iteration=True)
    logits: Tensor = outputs.logits[:, -1]
    return logits, model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)


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
