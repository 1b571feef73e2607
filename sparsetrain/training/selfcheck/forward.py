"""Self-checks of forward passes and gradients before training; each gives one line to print.

A failed check raises TrainingError with the reason, on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.data import Batch
from sparsetrain.data.document import IGNORE
from sparsetrain.data.sequence_part import sequence_part
from sparsetrain.errors import TrainingError
from sparsetrain.modeling import sparse_layers
from sparsetrain.modeling.attention.documents import keeps_documents_apart
from sparsetrain.modeling.ulysses import ULYSSES_ARGUMENT, Ulysses
from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.world import World

SHARED_TOKENS = 8192
"""Number of tokens of a row that are computed both on one rank and with sequence parallelism."""

WHOLE_TOKENS = 256
"""Number of tokens that are computed with the whole model including logits."""

ALONE_TOKENS = 1024
"""Maximum length of a document that is computed both alone and behind a longer one."""


def check_shared_sequence(
    model: PreTrainedModel, batch: Batch, world: World, ulysses: Ulysses | None = None
) -> Iterator[str]:
    """Check that sequence parallelism gives the hidden states that one rank computes alone.

    Yields:
        The line to print; none without sequence parallelism.
    """
    if ulysses is None:
        return
    tokens = batch.input_ids[:, :SHARED_TOKENS]
    length = tokens.shape[1]
    boundaries = torch.cat([batch.cu_seqlens[batch.cu_seqlens < length], batch.cu_seqlens.new_tensor([length])])
    row = _row(batch, tokens, boundaries)
    part = _hidden(model, row, world, ulysses)
    start = ulysses.rank * len(part)
    alone = _hidden(model, row, world)[start : start + len(part)]
    part = part[: len(alone)]
    error = ((part - alone).float().norm() / alone.float().norm().clamp(min=1e-30)).item() if len(alone) else 0.0
    error = world.largest(error)
    # In 16 bits rounding alone gives a few percent: matrix products of other shapes sum in another order.
    limit = 1e-3 if part.dtype == torch.float32 else 0.1
    reason = (
        f"a sequence over {ulysses.size} ranks differs from one rank's by {error:.3g} (relative RMS, limit {limit:g})"
    )
    _agree(error <= limit, reason, world)
    yield f"a sequence over {ulysses.size} ranks equals one rank's on {length:,} tokens: relative RMS error {error:.1e}"


def check_document_isolation(model: PreTrainedModel, batch: Batch, world: World, ulysses: Ulysses | None = None) -> str:
    """Check that changing the first document of a packed row does not change the hidden states of the others.

    A row with a single document is split into two for the check.
    """
    tokens, boundaries = batch.input_ids, batch.cu_seqlens
    if len(boundaries) == 2:
        if not keeps_documents_apart(model):
            return "documents are isolated: each has its own row"
        length = tokens.shape[1]
        boundaries = torch.tensor([0, length // 2, length], dtype=torch.int32)
    first = int(boundaries[1])
    changed = tokens.clone()
    changed[:, :first] = (changed[:, :first] + 1) % model.config.get_text_config().vocab_size
    before, after = (_hidden(model, _row(batch, ids, boundaries), world, ulysses) for ids in (tokens, changed))
    start = 0 if ulysses is None else ulysses.rank * len(before)
    before, after = (hidden[max(0, first - start) :] for hidden in (before, after))
    reason = f"hidden states are not finite before any training; look at the model's weights and dtype ({before.dtype})"
    _agree(bool(before.isfinite().all()), reason, world)
    # With sequence parallelism, the first rank may hold only the changed document.
    difference, size = (
        world.largest(tensor.abs().max().item() if tensor.numel() else 0.0) for tensor in (before - after, before)
    )
    _agree(
        difference <= 1e-3 * size,
        f"documents leak: changing the first document of the row changed the others' hidden states by {difference:.3g}",
        world,
    )
    return f"documents are isolated: {len(boundaries) - 1} in the row, largest change of the others {difference:.1e}"


def check_document_alone(
    model: PreTrainedModel, batch: Batch, world: World, ulysses: Ulysses | None = None
) -> Iterator[str]:
    """Check that a short document has the same hidden states behind a long one as alone.

    Yields:
        The line to print; none with sequence parallelism (:func:`check_shared_sequence`), or if a row has one document.
    """
    length = batch.input_ids.shape[1]
    short = min(length // 4, ALONE_TOKENS)
    if ulysses is not None or not keeps_documents_apart(model) or short == 0:
        return
    both = _row(batch, batch.input_ids, torch.tensor([0, length - short, length], dtype=torch.int32))
    one = _row(batch, batch.input_ids[:, length - short :], torch.tensor([0, short], dtype=torch.int32))
    packed, alone = _hidden(model, both, world)[length - short :].float(), _hidden(model, one, world)
    # The median over tokens: with experts, rounding alone may route a token differently.
    errors = (packed - alone).norm(dim=-1) / alone.float().norm(dim=-1).clamp(min=1e-30)
    error = world.largest(errors.median().item())
    limit = 1e-3 if alone.dtype == torch.float32 else 0.1
    reason = (
        f"a document of {short:,} tokens differs behind one of {length - short:,} from itself alone by {error:.3g} "
        f"(relative, limit {limit:g}): the model depends on the longest document of a row; set "
        "sequence.packing: false and train.micro_batch: 1"
    )
    _agree(error <= limit, reason, world)
    yield f"a document of {short:,} tokens behind one of {length - short:,} equals itself alone: error {error:.1e}"


def check_against_whole_model(loss: CausalLMLoss, batch: Batch, world: World) -> str:
    """Check that the logits and loss of the run equal those of the whole model, which may compute additional terms."""
    model = loss.model
    tokens = batch.input_ids[:, :WHOLE_TOKENS].to(world.device)
    tokens = torch.cat([tokens, tokens], 1) if tokens.shape[1] == 1 else tokens
    length = tokens.shape[1]
    positions = torch.arange(length, device=world.device)
    documents = positions.new_tensor([0, length], dtype=torch.int32)
    inputs = {"input_ids": tokens, "position_ids": positions[None], "cu_seqlens": documents}
    training, shared = loss.training, loss.shared
    # Each rank computes the whole row: sequence parallelism has its own check.
    loss.eval()
    loss.shared = {}
    try:
        with torch.no_grad():
            found = loss(**inputs, positions=positions[:-1], targets=tokens[0, 1:], num_chunks=1) / (length - 1)
            whole: Any = model(**inputs, use_cache=False, labels=tokens)
            logits = whole.logits.float()
            if loss.chunk is not None:
                hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
                logits = model.get_output_embeddings()(hidden).float()
    finally:
        loss.train(training)
        loss.shared = shared
    exact = model.dtype == torch.float32
    difference = ((logits - whole.logits.float()).norm() / whole.logits.float().norm().clamp(min=1e-30)).item()
    name, limit = type(model).__name__, 1e-4 if exact else 2e-2
    _agree(
        difference <= limit,
        f"the logits of {name} are not its output projection of the hidden states (they differ by {difference:.3g}, "
        f"relative RMS, limit {limit:g}); set train.loss_chunk: null",
        world,
    )
    wanted = found if whole.loss is None else whole.loss
    apart = abs((found - wanted).item())
    _agree(
        apart <= limit * max(1.0, abs(wanted.item())),
        f"the loss of {name} on {length} tokens is {wanted.item():.6g} and the run's {found.item():.6g}: it adds "
        "a term that would not be trained; switch it off with model.config_overrides",
        world,
    )
    return f"logits and loss equal those of the whole model on {length} tokens: {difference:.1e} and {apart:.1e}"


def check_against_oracle(model: PreTrainedModel, batch: Batch, world: World, ulysses: Ulysses | None = None) -> str:
    """Check the first sparse layer's output against its oracle in fp64, on the longest document of the first batch.

    With sequence parallelism each rank checks its heads.
    """
    layers = [(index, method) for index, _, method in sparse_layers(model) if method is not None]
    index, method = next(((index, method) for index, method in layers if method and not method.dense), (None, None))
    if method is None:
        names = {type(method).__name__.removesuffix("Method").lower() for _, method in layers}
        return f"sparse layer against its oracle: nothing to compare, layers attend in {' and '.join(sorted(names))}"
    with _first_call(method) as recorded:
        _hidden(model, batch, world, ulysses)
    layer, query, key, value, output, call = recorded
    longest = int(batch.cu_seqlens.diff().argmax())
    document = slice(*batch.cu_seqlens[longest : longest + 2].tolist())
    with torch.no_grad():
        rows, right = method.expected(layer, query, key, value, document=document, **call)
    error = ((output[:, :, rows].double() - right).norm() / right.norm()).item()
    limit = 1e-5 if output.dtype == torch.float32 else 2e-2
    reason = f"layer {index} differs from its oracle by {error:.3g} (relative RMS, limit {limit:g})"
    _agree(error <= limit, reason, world)
    return f"layer {index} equals its oracle on {len(rows):,} tokens: relative RMS error {error:.1e}"


class GradientWatch:
    """Records which trainable parameters receive a gradient in the backward passes of the first step."""

    def __init__(self, module: nn.Module) -> None:
        self.missing = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.total = len(self.missing)
        self.hooks = [
            parameter.register_hook(lambda gradient, name=name: self.missing.discard(name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def check(self) -> str:
        """Raise TrainingError unless every trainable parameter got a gradient."""
        for hook in self.hooks:
            hook.remove()
        if self.missing:
            names = ", ".join(sorted(self.missing)[:5])
            raise TrainingError(
                f"self-check failed: {len(self.missing)} of {self.total} trainable parameters got no gradient "
                f"({names}); freeze them or find out why the loss does not depend on them"
            )
        return f"a gradient reached all {self.total} trainable parameters"


def _row(batch: Batch, tokens: torch.Tensor, boundaries: torch.Tensor) -> Batch:
    """``batch`` with other tokens and documents, and without targets."""
    positions = torch.cat([torch.arange(length) for length in boundaries.diff().tolist()])[None]
    labels = torch.full_like(tokens, IGNORE)
    return replace(batch, input_ids=tokens, position_ids=positions, cu_seqlens=boundaries, labels=labels)


def _hidden(model: PreTrainedModel, batch: Batch, world: World, ulysses: Ulysses | None = None) -> torch.Tensor:
    """Last hidden states ``[T, hidden]`` of a packed row (logits of a long row would not fit), or of the part on
    this rank, padded to equal length on all ranks."""
    part = batch if ulysses is None else sequence_part(batch, ulysses.rank, ulysses.size)
    part = part.to(world.device)
    shared = {} if ulysses is None else {ULYSSES_ARGUMENT: ulysses}
    decoder = model.get_decoder() or model.base_model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = decoder(
                input_ids=part.input_ids,
                position_ids=part.position_ids,
                cu_seqlens=part.cu_seqlens,
                use_cache=False,
                **shared,
            )
    finally:
        model.train(training)
    return output.last_hidden_state[0]


@contextmanager
def _first_call(method: Any) -> Iterator[list[Any]]:
    """Record the first call of ``method.attend``: layer, query, key, value, output and the keyword arguments. The
    tensors of all layers of a long row would not fit."""
    call: list[Any] = []
    original = method.attend

    def attend(layer: nn.Module, query: Any, key: Any, value: Any, **options: Any) -> Any:
        output = original(layer, query, key, value, **options)
        if not call:
            # A learned sink is a parameter; under ZeRO-3 it is empty again after the layer.
            learned = {name: v.detach().clone() for name, v in options.items() if isinstance(v, nn.Parameter)}
            call.extend((layer, query, key, value, output, options | learned))
        return output

    method.attend = attend
    try:
        yield call
    finally:
        del method.attend


def _agree(passed: bool, reason: str, world: World) -> None:
    """Raise on every rank if the check failed on any."""
    if world.largest(float(not passed)):
        raise TrainingError(f"self-check failed: {reason or 'on another rank, see its message'}")
