"""Liger's fused Triton kernels for everything except attention: RMSNorm, MLP activation, rotary positions, loss.

Liger patches this model, as it knows the kernels for the modules of each model family. It also replaces classes and
functions in transformers' modules for models built later; these are restored, so that nothing outside this model
changes. A rotary function has no module to patch: the attention layers of this model get a copy of their forward that
refers to Liger's function under the old name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import ModelError, RecipeError
from sparsetrain.modeling import has_plain_head, sparse_layers

Choice = Literal["auto", "on", "off"]

# Liger patches the MLP of a model based only on its type; these are the activations that its kernels support.
ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
PROBE_TOKENS = 64


def wants_liger(choice: Choice, device: torch.device) -> bool:
    """Whether the kernels are to be used on this machine.

    Raises:
        RecipeError: ``on`` without a CUDA device or without the package.
    """
    installed = util.find_spec("liger_kernel") is not None
    if choice == "on" and device.type != "cuda":
        raise RecipeError(
            "train.liger=on: Liger's kernels run on CUDA devices, and this machine has none; set it to auto"
        )
    if choice == "on" and not installed:
        raise RecipeError("train.liger=on needs liger-kernel; `pip install liger-kernel`, or set it to auto")
    return choice != "off" and installed and device.type == "cuda"


def fuse_layers(model: PreTrainedModel, choice: Choice, device: torch.device) -> str:
    """Install Liger's kernels in the decoder layers of a sparsified model in place, and compare with the model's code.

    Args:
        device: The device of the comparison. The model may be on the host, and larger than the device: only the weights
            of one module are on the device at a time.

    Returns:
        A sentence that describes the fused kernels.

    Raises:
        ModelError: A kernel's result differs; Liger cannot be imported; or ``choice`` is ``on`` and Liger does not
            support the model.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    except ImportError as error:  # it imports internals of transformers, and supports only some versions
        raise ModelError(
            f"train.liger: {_name()} cannot be imported beside transformers {metadata.version('transformers')} "
            f"({error}); install another version of liger-kernel, or set it to off"
        ) from error

    family = model.config.model_type
    if family not in KNOWN:
        if choice == "on":
            raise ModelError(f"train.liger=on: {_name()} does not know models of type {family}; set it to auto")
        return f"{_name()} does not know models of type {family}; nothing is fused in its layers"
    apply = KNOWN[family]
    options = _options(model, inspect.signature(apply).parameters)
    with _transformers_unchanged() as replaced:
        apply(model=model, **options)
    options["rope"] = _replace_functions(model, replaced) > 0
    difference = _largest_difference(model, device)
    kernels = ", ".join(name for name, used in options.items() if used)
    return f"{_name()} in the decoder layers: {kernels}; largest difference of a module's output {difference:.1e}"


def can_fuse_loss(model: PreTrainedModel) -> bool:
    """Whether :func:`fuse_loss` computes this model's loss: logits that are a plain linear map, and no fp16.

    In fp16 the kernel would form the logits' gradient before DeepSpeed scales the loss, where small ones are lost.
    """
    head = model.get_output_embeddings()
    return has_plain_head(model) and type(head) is nn.Linear and head.weight.dtype != torch.float16


def fuse_loss(head: Any) -> None:
    """Make an output projection return the summed NLL of ``targets`` if it is called with targets.

    The loss must be computed inside the projection's forward, because under ZeRO-3 its weight exists only there.
    """
    head.forward = MethodType(_project, head)


def _project(head: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # Accumulate in fp32, because the gradient of the weight is a sum over all chunks. The other values are defaults.
    options = (None, IGNORE, 0.0, 0.0, "sum", None, False, torch.float32)
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, head.weight, targets, head.bias, *options)[0]


def _options(model: PreTrainedModel, known: Any) -> dict[str, bool]:
    """The options of Liger's patch for this model. The loss is not patched: we call its kernel directly."""
    text_config = model.config.get_text_config()
    activation = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    options = {"rope": True, "rms_norm": True, "layer_norm": True}
    options |= {kernel: activation in names for kernel, names in ACTIVATIONS.items()}
    options |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return {name: value for name, value in options.items() if name in known}


@contextmanager
def _transformers_unchanged() -> Iterator[dict[ModuleType, dict[str, Any]]]:
    """Restore what is replaced in transformers' modules; yields the replacements by module, filled in at the end."""
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before = {module: dict(vars(module)) for module in modules if type(module) is ModuleType}
    replaced: dict[ModuleType, dict[str, Any]] = {}
    try:
        yield replaced
    finally:
        for module, names in before.items():
            changed = {name: vars(module)[name] for name, old in names.items() if vars(module)[name] is not old}
            if changed:
                replaced[module] = changed
                vars(module).update({name: names[name] for name in changed})


def _replace_functions(model: PreTrainedModel, replaced: dict[ModuleType, dict[str, Any]]) -> int:
    """Make the attention layers call the functions that were replaced in their module; returns the number of layers."""
    layers = 0
    for _, layer, _ in sparse_layers(model):
        forward = inspect.unwrap(type(layer).forward)
        functions = {
            name: new
            for name, new in replaced.get(sys.modules[forward.__module__], {}).items()
            if isinstance(new, FunctionType) and name in forward.__code__.co_names
        }
        if functions:
            own = FunctionType(
                forward.__code__,
                {**forward.__globals__, **functions},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            own.__kwdefaults__ = forward.__kwdefaults__
            layer.forward = MethodType(own, layer)
            layers += 1
    return layers


@torch.no_grad()
def _largest_difference(model: PreTrainedModel, device: torch.device) -> float:
    """The largest relative RMS difference between a patched module's output and that of its own class, on a few tokens.

    Raises:
        ModelError: It is larger than rounding explains.
    """
    differences: dict[str, float] = {}

    def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = type(module).forward(module, *args, **kwargs)
        found, wanted = ((x[0] if isinstance(x, tuple) else x).float() for x in (output, own))
        difference = ((found - wanted).norm() / wanted.norm()).item()
        name = type(module).__name__
        differences[name] = max(difference, differences.get(name, 0.0))

    decoder: Any = model.get_decoder()
    tokens = torch.arange(PROBE_TOKENS, device=device)[None]
    ids = tokens % model.config.get_text_config().vocab_size
    patched = [module for module in decoder.modules() if "forward" in vars(module)]
    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in patched]
    training = model.training
    model.eval()
    try:
        # Inside the context: a module is compared before its weights return to the host.
        with _visiting(decoder, device):
            decoder(input_ids=ids, position_ids=tokens, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    name, difference = max(differences.items(), key=lambda item: item[1], default=("", 0.0))
    if not difference <= (1e-3 if model.dtype == torch.float32 else 0.05):
        raise ModelError(
            f"train.liger: with {_name()} the output of {name} differs by {difference:.3g} (relative RMS) from the "
            "model's own; set it to off"
        )
    return difference


@contextmanager
def _visiting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the tensors of each module to the device for its forward, and back to the host afterwards."""
    at_home: dict[Tensor, Tensor] = {}

    def visit(module: nn.Module, _: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device != device:
                at_home[tensor] = tensor.data
                tensor.data = tensor.data.to(device)

    def leave(module: nn.Module, *_: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor in at_home:
                tensor.data = at_home.pop(tensor)

    hooks = [module.register_forward_pre_hook(visit) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _name() -> str:
    return f"Liger {metadata.version('liger-kernel')}"
