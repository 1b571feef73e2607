"""A model with its attention method for lm-evaluation-harness (``pip install 'sparsetrain[eval]'``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsetrain.data import Row, collate
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import ModelError
from sparsetrain.evaluation.scoring import CHUNK, logits_at
from sparsetrain.modeling import check_learned_positions, sparse_layers, sparsify
from sparsetrain.modeling.positions import position_limit

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'sparsetrain[eval]'") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 16384
"""Tokens of the texts that are scored in one pass."""


@dataclass
class Text:
    """A text that is read once, and the continuations that are scored behind its context. They differ in their last
    token alone."""

    read: list[int]
    """Context and continuation without the last token."""
    scored: int
    """Tokens of a continuation."""
    continuations: dict[int, list[int]] = field(default_factory=dict)
    """By the index of the request."""


class HarnessModel(HFLM):
    """A model for ``lm_eval.simple_evaluate(model=...)``, with its attention method, its cache and its decode section.

    Likelihoods: texts are packed into one row, where each attends to itself alone, and logits are computed for what is
    scored. The harness's own model pads them on the right, without a mask, and computes the logits of every token of a
    batch at once. Texts are written as that one does it, in batches padded on the left with a mask.

    Args:
        model: as it came, or gone through :func:`sparsetrain.sparsify` or :func:`sparsetrain.load`. A model as it came
            is given full attention, in place.
        max_length: tokens of a context with its continuation, or with what is written behind it; by default the model's
            positions.
        batch_size: prompts that are written behind at a time.
        truncate: cut longer ones from the left, as the harness does. By default they are refused.
        add_bos_token: as for the harness: None is what the tokenizer does.

    Raises:
        ModelError: a value is wrong, the model has no such positions, or several ranks were started.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_size: int = 1,
        truncate: bool = False,
        add_bos_token: bool | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ModelError("each of several ranks would measure everything; start one process for lm-eval")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ModelError(
                f"batch_size={batch_size!r} is no number of prompts; give 1 or more (auto does not work here)"
            )
        longest = position_limit(model) if max_length is None else max_length
        if longest is None:
            raise ModelError("the model's config has no max_position_embeddings; give max_length")
        if longest < 2:
            raise ModelError(f"max_length={longest} has no room for a context and a continuation; give more")
        check_learned_positions(model, {"max_length": [longest]})
        if not sparse_layers(model):
            sparsify(model, {"method": "full"})
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=longest,
            batch_size=batch_size,
            add_bos_token=add_bos_token,
        )
        self.truncate = truncate

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as a batch: token ids and mask, ``[B, N]`` each.

        Raises:
            ModelError: one is too long.
        """
        if left_truncate_len is not None and not self.truncate:
            longest = max(len(self.tok_encode(string)) for string in strings)
            if longest > left_truncate_len:
                raise ModelError(
                    f"a prompt of {longest:,} tokens leaves no room for its answer: max_length={self.max_length:,} has "
                    f"{left_truncate_len:,} for it; raise max_length, or cut prompts from the left with truncate=True"
                )
        encoded: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
            strings, padding_side, left_truncate_len, truncation
        )
        return encoded

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """The log-likelihood of each continuation, in nats, and whether it is what greedy decoding writes.

        Args:
            requests: what the harness stores the result for, the tokens of the context and those of the continuation.
        """
        from tqdm import tqdm

        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm) as bar:
            for texts in _passes(self._texts(requests)):
                for index, result in self._score(texts):
                    found[index] = result
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                    bar.update()
        return [found[index] for index in range(len(requests))]

    def _texts(self, requests: Sequence[Any]) -> list[Text]:
        texts: dict[tuple[Any, ...], Text] = {}
        for index, (_, context, continuation) in enumerate(requests):
            tokens = [*context, *continuation]
            if len(tokens) > self.max_length + 1 and (not self.truncate or len(continuation) > self.max_length):
                raise ModelError(
                    f"a context of {len(context):,} tokens and its continuation of {len(continuation):,} are longer "
                    f"than max_length={self.max_length:,}; raise it, or cut contexts from the left with truncate=True"
                )
            read = tokens[-(self.max_length + 1) :][:-1]
            key = (len(continuation), *read)
            texts.setdefault(key, Text(read, len(continuation))).continuations[index] = list(continuation)
        return list(texts.values())

    def _score(self, texts: list[Text]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The results of the requests of a pass, by their index."""
        batch = collate([_row(text.read) for text in texts])
        ends = np.cumsum([len(text.read) for text in texts])
        positions = np.concatenate([np.arange(end - text.scored, end) for text, end in zip(texts, ends, strict=True)])
        firsts = np.cumsum([0, *(text.scored for text in texts[:-1])])
        # The place among all scored positions, the token and the request, of every continuation.
        places: list[int] = []
        tokens: list[int] = []
        requests: list[int] = []
        for text, first in zip(texts, firsts.tolist(), strict=True):
            for index, continuation in text.continuations.items():
                places += range(first, first + text.scored)
                tokens += continuation
                requests += [index] * text.scored
        place, token = torch.tensor(places, device=self.device), torch.tensor(tokens, device=self.device)
        nll = torch.zeros(len(places), dtype=torch.float64, device=self.device)
        right = torch.zeros(len(places), dtype=torch.bool, device=self.device)
        done = 0
        wanted = torch.from_numpy(positions).to(self.device)
        for logits in logits_at(self.model, batch, self.device, wanted, num_chunks=-(-len(positions) // CHUNK)):
            inside = ((place >= done) & (place < done + len(logits))).nonzero()[:, 0]
            rows, wanted_tokens = place[inside] - done, token[inside]
            nll[inside] = (logits.logsumexp(-1)[rows] - logits[rows, wanted_tokens]).double()
            right[inside] = logits.argmax(-1)[rows] == wanted_tokens
            done += len(logits)
        sums: dict[int, tuple[float, bool]] = {}
        for index, loss, is_right in zip(requests, nll.tolist(), right.tolist(), strict=True):
            likelihood, greedy = sums.get(index, (0.0, True))
            sums[index] = likelihood - loss, greedy and is_right
        yield from sums.items()


def _passes(texts: list[Text]) -> Iterator[list[Text]]:
    """The texts that are read together, the longest first."""
    batch: list[Text] = []
    for text in sorted(texts, key=lambda text: -len(text.read)):
        if batch and sum(len(each.read) for each in batch) + len(text.read) > TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _row(tokens: list[int]) -> Row:
    ids = np.array(tokens, dtype=np.int64)
    return Row(ids, np.full(len(ids), IGNORE), [len(ids)], ["lm-eval"])
