"""Ways to take the training steps of one recipe: its own loop, the same with other attention, and loops of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparsetrain.bench.contenders.offloads import Offload, cpu_checkpointing, hidden_states_offload
from sparsetrain.bench.contenders.random_run import random_model, random_steps
from sparsetrain.bench.contenders.stand_ins import use_flex, use_no_attention
from sparsetrain.bench.measure import Unavailable
from sparsetrain.data import Batch
from sparsetrain.methods.full import FullConfig
from sparsetrain.modeling import sparsify
from sparsetrain.modeling.attention.name import lift_guard
from sparsetrain.recipe import BatchPlan, Recipe
from sparsetrain.training.checkpoints import TrainState
from sparsetrain.training.distributed.build import build_engine
from sparsetrain.training.distributed.deepspeed_config import deepspeed_config
from sparsetrain.training.distributed.engine import destroy
from sparsetrain.training.distributed.sequence_parallel import check_shareable
from sparsetrain.training.job import Job
from sparsetrain.training.loop import Callbacks, Loop
from sparsetrain.training.memory.liger import fuse_layers, wants_liger
from sparsetrain.training.output.progress import Progress
from sparsetrain.training.step import StepResult
from sparsetrain.training.supervision.signals import StopSignals
from sparsetrain.training.trainable import choose_trainable, trainable_size
from sparsetrain.world import World

PLAIN_CHUNK = 4096
"""Number of positions whose logits are computed at once in the plain loop."""

AfterStep = Callable[..., None]
"""Called with the seconds of each step; by a way that knows them, with its loss and the norm of its gradient too."""


@dataclass(frozen=True)
class Way:
    """A way to take steps."""

    name: str
    run: Callable[[Recipe, BatchPlan, World, AfterStep], None]
    """Take ``plan.steps`` steps."""
    attention: str | None = None
    """The attention of its model; None for the recipe's method."""
    offload: Offload | None = None
    """What moves the inputs of its layers to host memory, in the place of ``train.offload_activations``."""


def _ours(
    recipe: Recipe,
    plan: BatchPlan,
    world: World,
    after_step: AfterStep,
    stand_in: str | None = None,
    offload: Offload | None = None,
) -> None:
    """The loop of ``sparsetrain run`` on random tokens, behind the warm-up of its method: that ends, and so few steps
    would be all of it.

    Args:
        stand_in: another attention.
        offload: what moves the inputs of layers to host memory, in the place of ``train.offload_activations``.
    """
    pattern = recipe.attention.pattern()
    if stand_in == "flex" and (pattern is None or pattern.per_head or len(pattern.by_layer) > 1):
        raise Unavailable(
            f"attention.method={recipe.attention.method} has no block pattern, the same in all heads and layers, that "
            "FlexAttention could take"
        )
    attention = recipe.attention.settled() if stand_in is None else FullConfig()
    recipe = recipe.model_copy(update={"attention": attention})
    if stand_in is not None:
        recipe = _with_train(recipe, new_modules_lr=None, parameters="all")
    if offload is not None:
        recipe = _with_train(recipe, offload_activations=False)
    model = sparsify(random_model(recipe, world.device), recipe.attention)
    check_shareable(model, recipe.sequence.parallel)
    if wants_liger(recipe.train.liger, world.device):
        fuse_layers(model, recipe.train.liger, world.device)
    choose_trainable(model, recipe)
    if stand_in == "bare":
        use_no_attention(model)
    elif stand_in == "flex" and pattern is not None:
        use_flex(model, pattern, recipe.sequence.length, world.device)
    config = deepspeed_config(recipe, plan, trainable_size(model))
    engine = build_engine(model, recipe, plan, config, world, say=lambda line: None).deepspeed

    class Timing(Callbacks):
        def on_step(self, step: int, result: StepResult) -> None:
            after_step(result.seconds, result.loss, result.grad_norm)

    with TemporaryDirectory() as folder:
        # The folder holds what is said of a loss that is not finite; a rank other than 0 shows nothing.
        job = Job(recipe, Path(folder), world, StopSignals(), Progress(rank=1))
        loader: Any = random_steps(model.config.vocab_size, plan, world)
        loop = Loop(job, plan, engine, loader, TrainState(step=0, ranks=world.size), Timing())
        moved = nullcontext() if offload is None else offload(engine, model, recipe, world.device)
        try:
            with moved:
                loop.run()
        finally:
            destroy(engine)


def _with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _plain(recipe: Recipe, plan: BatchPlan, world: World, after_step: AfterStep) -> None:
    """A short training script: bf16 weights and AdamW states, SDPA, checkpointed layers, the loss in chunks."""
    model, trained, optimizer = _with_sdpa(recipe, world)
    head: Any = model.get_output_embeddings()

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    def loss_of(batch: Batch) -> torch.Tensor:
        rows = batch.input_ids.view(plan.micro_batch, -1)
        hidden = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
        # The last token of a row has the label of the next row's first, which carries no loss.
        pieces = zip(hidden.split(PLAIN_CHUNK), batch.labels[0, 1:].split(PLAIN_CHUNK), strict=True)
        return sum(checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces)

    def step(batch: Batch) -> None:
        (loss_of(batch) / batch.num_target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    _timed(step, model.config.vocab_size, plan, world, after_step)


def _hugging_face(
    recipe: Recipe, plan: BatchPlan, world: World, after_step: AfterStep, *, attention: bool = True
) -> None:
    """transformers with SDPA, checkpointing and Liger's patch (its fused loss too), under DeepSpeed."""
    import deepspeed

    model, _, optimizer = _with_sdpa(recipe, world)
    if wants_liger("on", world.device):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if not attention:
        use_no_attention(model)
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config(recipe, plan), optimizer=optimizer)

    def step(batch: Batch) -> None:
        rows, labels = batch.input_ids.view(plan.micro_batch, -1), batch.labels[:, :-1].view(plan.micro_batch, -1)
        engine.backward(engine(input_ids=rows, labels=labels, use_cache=False).loss)
        engine.step()

    try:
        _timed(step, model.config.vocab_size, plan, world, after_step)
    finally:
        destroy(engine)


def _with_sdpa(recipe: Recipe, world: World) -> tuple[Any, list[torch.nn.Parameter], torch.optim.Optimizer]:
    """The model of a loop of others, what it trains, and its optimizer."""
    if world.size > 1:
        raise Unavailable("a loop of one process; start it without the launcher")
    model = sparsify(random_model(recipe, world.device), FullConfig())  # for the adapters; its attention is replaced
    choose_trainable(model, recipe)
    lift_guard(model)
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, trained, torch.optim.AdamW(trained, lr=recipe.train.lr, fused=world.device.type == "cuda")


def _timed(step: Callable[[Batch], None], vocab: int, plan: BatchPlan, world: World, after_step: AfterStep) -> None:
    for index, steps in enumerate(random_steps(vocab, plan, world)):
        if index == plan.steps:
            return
        batches = [micro.to(world.device) for micro in steps.micro_batches]
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        after_step(time.perf_counter() - began)


def _offloading(name: str, offload: Offload) -> Way:
    return Way(name, partial(_ours, offload=offload), offload=offload)


WAYS = (
    Way("recipe", _ours),
    Way("dense", partial(_ours, stand_in="dense"), "full"),
    Way("flex", partial(_ours, stand_in="flex")),
    Way("bare", partial(_ours, stand_in="bare"), "none"),
    _offloading("ds-cpu", cpu_checkpointing),
    _offloading("ds-hidden", hidden_states_offload),
    Way("plain", _plain, "full"),
    Way("hf", _hugging_face, "full"),
    Way("hf-bare", partial(_hugging_face, attention=False), "none"),
)
"""The ways by name, as explained in ``sparsetrain bench step --help``."""
