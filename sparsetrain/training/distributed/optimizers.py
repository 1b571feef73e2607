"""The optimizer of a run: AdamW with states in 32, 16 or 8 bits, Muon, or Adafactor, and what is refused of each."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module, metadata, util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.errors import RecipeError
from sparsetrain.modeling.layers import new_modules
from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.schedule import new_modules_peak, rest_peak

MUON_SINCE = (0, 19, 8)
"""The first version of DeepSpeed with which Muon was tried here; earlier ones update its momentum differently."""


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that is not installed.

    Raises:
        RecipeError: Its package is missing or too old; names both and the fix.
    """
    name = recipe.train.optimizer.name
    if name == "adamw_8bit" and util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "train.optimizer.name=adamw_8bit needs bitsandbytes; `pip install sparsetrain[quantize]`, or use adamw"
        )
    if name == "muon":
        found = metadata.version("deepspeed")
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
        if numbers < MUON_SINCE:
            wanted = ".".join(map(str, MUON_SINCE))
            raise RecipeError(
                f"train.optimizer.name=muon needs DeepSpeed {wanted} or later, and {found} is installed; "
                f"`pip install 'deepspeed>={wanted}'`, or use adamw"
            )


def build_optimizer(module: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimizer in up to six groups: with weight decay (matrices) and without (norms, biases, embeddings),
    each also for the modules that the attention method adds, which have their own learning rate; with Muon, the
    matrices that it trains are apart from those that it does not. Each group holds its ``peak_lr``.
    """
    section, stage = recipe.train.optimizer, recipe.deepspeed.stage
    groups = _groups(module, recipe)
    constants: dict[str, Any] = {"betas": section.betas, "eps": section.eps}
    if section.name == "muon":
        return _muon(groups, constants, device)
    if section.name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **constants)
    if section.name == "adafactor":
        return finite_adafactor()(groups, scale_parameter=False, relative_step=False)
    if recipe.deepspeed.offload_optimizer == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **constants)
    kind = FiniteAdamW if stage == 0 else torch.optim.AdamW
    return kind(groups, fused=device.type == "cuda", **constants)


def _groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    train = recipe.train
    tables = (layer for layer in module.modules() if isinstance(layer, nn.Embedding))
    # With the rows of added tokens.
    embeddings = {id(parameter) for table in tables for parameter in table.parameters(recurse=False)}
    added = {id(p) for new in new_modules(module, recipe.attention).values() for p in new.parameters()}
    muon = _muons_matrices(module) - embeddings - added if train.optimizer.name == "muon" else set()
    groups: dict[tuple[bool, bool, bool], Any] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = id(parameter)
            matrix = parameter.ndim >= 2 and kind not in embeddings
            decay = train.optimizer.weight_decay if matrix else 0.0
            peak = new_modules_peak(train) if kind in added else train.lr if kind in muon else rest_peak(train)
            group = {"params": [], "weight_decay": decay, "lr": peak, "peak_lr": peak}
            if train.optimizer.name == "muon":
                group["use_muon"] = parameter.use_muon = kind in muon  # type: ignore[attr-defined]
                group |= {"momentum": train.optimizer.momentum} if kind in muon else {}
            groups.setdefault((matrix, kind in added, kind in muon), group)["params"].append(parameter)
    return list(groups.values())


def _muons_matrices(module: nn.Module) -> set[int]:
    """What Muon is made for: two-dimensional weights of hidden layers, so not the output head (2502.16982)."""
    heads = (each.get_output_embeddings() for each in module.modules() if isinstance(each, PreTrainedModel))
    outputs = {id(parameter) for head in heads if head is not None for parameter in head.parameters()}
    return {id(p) for p in module.parameters() if p.ndim == 2 and p.requires_grad} - outputs


def _muon(groups: list[dict[str, Any]], constants: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    if not any(group["use_muon"] for group in groups):
        raise RecipeError("train.optimizer.name=muon, but no matrix of a hidden layer is trained; use adamw")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group |= {} if group["use_muon"] else constants
    fused = {"fused": device.type == "cuda"}
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={**constants, **fused})


def eager_muon(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which DeepSpeed's Muon, which it compiles, needs no C++ compiler on a machine without a GPU.

    ZeRO imports it for every optimizer, and with it torch's compiler, which takes two seconds. Here it is imported as
    it is written; the context is for one that somebody imported before.
    """
    if device.type == "cuda":
        return nullcontext()
    from deepspeed.runtime import compiler

    compile = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile
    muon = recipe.train.optimizer.name == "muon"
    return torch.compiler.set_stance("force_eager") if muon else nullcontext()


class FiniteStep:
    """A mixin for an optimizer without ZeRO that skips the step if the gradient is not finite.

    ZeRO's optimizers do this themselves, and record the gradient norm. In fp32 without ZeRO, DeepSpeed does neither.
    Without ZeRO every rank has the same reduced gradients, so all ranks take the same decision. DeepSpeed reads both
    attributes.
    """

    # True until the engine is built: for 16-bit weights DeepSpeed steps once on zeros to allocate the state, which
    # would decay the weights and count in Adam's bias correction.
    overflow = True
    _global_grad_norm: float | None = None
    param_groups: list[dict[str, Any]]

    def measure(self) -> None:
        """Record the norm of the whole gradient before DeepSpeed clips it."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm(gradients).item()
        self.overflow = not math.isfinite(self._global_grad_norm)


class FiniteAdamW(FiniteStep, torch.optim.AdamW):
    """AdamW of a run without ZeRO."""

    def step(self, closure: Any = None) -> Any:
        return None if self.overflow else super().step(closure)


def finite_adafactor() -> type[Any]:
    """The class of transformers' Adafactor in a run without ZeRO, with the rate of the recipe's schedule.

    Made when it is wanted: its module imports peft, and with it bitsandbytes, which takes seconds.
    """
    from transformers.optimization import Adafactor

    class FiniteAdafactor(FiniteStep, Adafactor):
        def step(self, closure: Any = None) -> Any:
            return None if self.overflow else super().step(closure)

    return FiniteAdafactor
