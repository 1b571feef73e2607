"""Generation with a model of random weights: seconds of the prompt, tokens a second, bytes of the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, StoppingCriteria, StoppingCriteriaList

from sparsetrain.bench.case import Case, Log
from sparsetrain.bench.contenders.writers import Way, without_attention
from sparsetrain.bench.measure import Unavailable, captured, explain, once_ms
from sparsetrain.bench.table import Report, Row, column, formatted
from sparsetrain.counted import counted
from sparsetrain.generation.observed import observing
from sparsetrain.inference.fewer_kernels import ready_for_steps
from sparsetrain.inference.loop import generate
from sparsetrain.inference.writer import cache_bytes
from sparsetrain.modeling import SparseCache

SETTLING = 4
"""Steps that compile and are not timed; a graph of ``torch.compile`` is recorded in the third."""
ONE_BY_ONE = 16
"""The most steps that are timed one by one: the host is what they wait for, all alike."""
RATE = formatted("{:,.1f}")


@dataclass(kw_only=True)
class GenerateRow(Row):
    """One way at one length of the prompts."""

    title: str
    prompt_seconds: float | None = column("prompt s", optional=True)
    """A pass of the prompts."""
    generate_rate: float | None = column("generate", optional=True, form=RATE)
    """New tokens a second over all rows by ``sparsetrain.generate``, the host and its stop flag included."""
    rate: float | None = column("step by step", form=RATE)
    """The same with a model called for each step."""
    graph_rate: float | None = column("as a CUDA graph", optional=True, form=RATE)
    """The same with every step as one CUDA graph, where a step is the same for every length."""
    attention_ms: float | None = column("attention ms", optional=True)
    """Milliseconds of such a graph that are attention and the cache: it is timed without them too."""
    compiled_rate: float | None = column("compiled", optional=True, form=RATE)
    """The same with steps that ``torch.compile`` made, as ``generate`` does on a GPU."""
    kept: float | None = column("keys read", optional=True, form=formatted("{:.2%}"))
    """Share of the keys that layers which choose attend to in a step."""
    cache_gb: float | None = column("cache GB")
    """Bytes that the cache holds, in 1e9."""
    peak_gb: float | None = column("peak GB", optional=True)
    """All memory allocated at the peak, prompt and weights included, in 1e9 bytes."""

    @property
    def order_ms(self) -> float | None:
        """Time of a token."""
        best = self.generate_rate or self.compiled_rate or self.graph_rate or self.rate
        return 1e3 / best if best else None

    @property
    def summary(self) -> str:
        """The rates."""
        rates = f"{RATE(self.rate)} tokens/s step by step"
        for rate, how in (
            (self.generate_rate, "by generate"),
            (self.graph_rate, "as a CUDA graph"),
            (self.compiled_rate, "compiled"),
        ):
            rates += f", {RATE(rate)} {how}" if rate else ""
        return self.reason or rates

    def ends(self) -> tuple[dict[str, Text], dict[str, Text]]:
        """The title."""
        return {"": Text(self.title)}, {}

    @staticmethod
    def legend(report: Report) -> str:
        """Where the keys come from."""
        options, passed = report.options, report.options["fill"] == "prefill"
        return (
            f"Batches of {options['batch']}. Keys "
            + ("of a pass of random prompts" if passed else "of random hidden states, without a pass of the prompts")
            + f"; {counted(options['new_tokens'], 'greedy token')} after them. "
            f"{counted(options['layers'], 'layer')} with random weights."
        )


@dataclass(frozen=True)
class GenerateCase(Case):
    """Prompts of several lengths, and the tokens after them."""

    config: Mapping[str, Any]
    """The model, as for ``AutoConfig.for_model``."""

    @property
    def on_a_cpu(self) -> str:
        """The note for CPUs."""
        return "No GPU: these are CPU timings of a tiny model, without CUDA graphs and peaks of memory."

    def row(self, way: Way, length: int) -> GenerateRow:
        """An empty row."""
        return GenerateRow(length=length, name=way.name, title=way.title)

    def inputs(self, length: int, report: Report, log: Log) -> Tensor:
        """Random prompts, int64 ``[batch, length]``."""
        generator = torch.Generator(self.device).manual_seed(length)
        shape = (self.options.batch, length)
        return torch.randint(self.config["vocab_size"], shape, device=self.device, generator=generator)

    @torch.no_grad()
    def measure(self, way: Way, ids: Tensor, row: Any, report: Report) -> None:
        """The prompts ``[batch, length]``, steps one by one, one that says what it reads, and steps as a graph."""
        options, cuda = self.options, self.device.type == "cuda"
        room = ids.shape[1] + 5 * options.new_tokens + 8 * SETTLING
        self.check_memory(way, ids.shape[1], room)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        model = way.model(self.config, getattr(torch, options.dtype), self.device)
        if way.method is not None:
            ready_for_steps(model)
        if options.fill == "prefill":
            # Compiles what the timed pass runs.
            way.read_prompt(model, way.cache(model, room), ids)
        cache = way.cache(model, room)
        if options.fill == "prefill":
            token, ms = once_ms(lambda: way.read_prompt(model, cache, ids), self.device)
            row.prompt_seconds = ms / 1e3
        else:
            token = way.fill(model, cache, ids)

        def step(forward: Any = model) -> None:
            out: Any = forward(token, past_key_values=cache, use_cache=True)
            token.copy_(out.logits[:, -1:].argmax(-1))

        def rate(call: Any, steps: int = options.new_tokens) -> float:
            _, ms = once_ms(lambda: [call() for _ in range(steps)], self.device)
            return 1e3 * token.numel() * steps / ms

        for _ in range(SETTLING):
            step()
        row.rate = rate(step, min(options.new_tokens, ONE_BY_ONE))
        with observing():
            step()
        row.cache_gb, row.kept = cache_bytes(cache) / 1e9, kept(cache)
        if cuda and cache.is_compileable:
            self.measure_captured(cache, step, rate, token.numel(), row)
            if options.compile:
                self.measure_compiled(model, step, rate, row)
        if isinstance(cache, SparseCache):
            row.generate_rate = self.measure_generate(model, cache, ids, token)
        if cuda:
            row.peak_gb = torch.cuda.max_memory_allocated() / 1e9

    def measure_generate(self, model: Any, cache: SparseCache, ids: Tensor, token: Tensor) -> float:
        """New tokens a second of ``sparsetrain.generate`` that goes on with a cache, from the first replay on.

        Args:
            ids: the prompts, int64 ``[batch, length]``.
            token: the last tokens, int64 ``[batch, 1]``.
        """
        seen, new = int(cache.get_seq_length()), self.options.new_tokens
        text = torch.cat([ids, token.expand(-1, seen + 1 - ids.shape[1])], dim=1)
        pace = _Pace()
        with observing():
            generate(
                model,
                text,
                attention_mask=torch.ones_like(text),
                past_key_values=cache,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=0,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([pace]),
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        # Of the first three tokens one is of the prompt's pass, one of a plain step, one of the capture.
        first = min(3, new - 1)
        return token.numel() * (new - first) / (time.perf_counter() - pace.times[first - 1])

    def measure_captured(self, cache: Any, step: Any, rate: Any, rows: int, row: GenerateRow) -> None:
        """Steps that are one CUDA graph, and the same without attention."""
        try:
            row.graph_rate = rate(captured(step))
            if isinstance(cache, SparseCache):
                with without_attention(cache):
                    rest = rate(captured(step))
                row.attention_ms = 1e3 * rows * (1 / row.graph_rate - 1 / rest)
        except Exception as error:
            row.note = f"no CUDA graph: {explain(error)}"

    def measure_compiled(self, model: Any, step: Any, rate: Any, row: GenerateRow) -> None:
        """Steps that are compiled as ``generate`` compiles them."""
        try:
            torch._dynamo.reset()
            forward = model.get_compiled_call(CompileConfig())
            for _ in range(SETTLING):
                step(forward)
            row.compiled_rate = rate(lambda: step(forward))
        except Exception as error:
            row.note = f"not compiled: {explain(error)}"

    def failed(self, way: Way, row: Row, error: Exception) -> None:
        """Memory that ran out all the same is told in bytes too."""
        super().failed(way, row, error)
        if isinstance(error, torch.OutOfMemoryError):
            peak, there = torch.cuda.max_memory_allocated(), memory(self.device)
            row.reason = (
                f"out of memory with {peak:,} of {there:,} bytes allocated; lower --layers, --batch or --lengths"
            )

    def check_memory(self, way: Way, length: int, room: int) -> None:
        """Refuse what cannot fit.

        Raises:
            Unavailable: says how many bytes are needed and there.
        """
        config, batch, size = self.config, self.options.batch, getattr(torch, self.options.dtype).itemsize
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        weights = size * sum(each.numel() for each in model.parameters())
        heads = config["num_hidden_layers"] * config["num_key_value_heads"]
        keys = int(way.bytes_of_a_key(config["head_dim"], size) * heads * room * batch)
        mlp, width = 3 * config["intermediate_size"], 4 * config["hidden_size"]
        passing = batch * length * size * (width + (mlp if self.options.fill == "prefill" else 0))
        need, there = weights + keys + passing, memory(self.device)
        if need > there:
            raise Unavailable(
                f"needs {need:,} bytes ({weights:,} of weights, {keys:,} of keys, {passing:,} for the prompt), and the "
                f"device has {there:,}; lower --layers, --batch or --lengths"
            )


class _Pace(StoppingCriteria):
    """Notes when each token was chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kept(cache: Any) -> float | None:
    """The mean share of the keys that layers which choose have read; None where no layer does."""
    memories = [getattr(layer, "memory", None) for layer in cache.layers]
    found = [each.observations().get("kept") for each in memories if each is not None]
    shares = [each for each in found if each is not None]
    return sum(shares) / len(shares) if shares else None
