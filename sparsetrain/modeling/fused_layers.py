"""Liger's fused Triton kernels in the layers of a model, for everything except attention: RMSNorm, MLP activation,
rotary positions.

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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsetrain.modeling.layers import sparse_layers

# Liger patches the MLP of a model based only on its type; these are the activations that its kernels support.
ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
PROBE_TOKENS = 64
PATCHED = ("forward", "extra_repr", "_get_name")
"""What Liger sets on modules."""


class NotFused(Exception):
    """Why the layers stay as they are, in words that follow on the name of whatever asked."""


class ResultsDiffer(NotFused):
    """A kernel computes something else than the model's own code."""


class VersionsDiffer(NotFused):
    """The installed Liger and transformers do not work together."""


class UnknownFamily(NotFused):
    """Liger has no kernels for this kind of model."""


def is_installed() -> bool:
    """Whether Liger is there."""
    return util.find_spec("liger_kernel") is not None


def fuse(model: PreTrainedModel, device: torch.device, *, whole: bool = False) -> str:
    """Install Liger's kernels in the decoder layers of a sparsified model in place, and compare with the model's code.

    Modules whose output differs by more than rounding keep their own code. So do experts in fp32, whose kernel computes
    products in TF32.

    Args:
        device: The device of the comparison. The model may be on the host, and larger than the device: only the weights
            of one module are on the device at a time.
        whole: Raise instead where the output of a module differs.

    Returns:
        A sentence that describes the fused kernels, and names the modules that keep their own code.

    Raises:
        NotFused: Liger cannot be imported or does not know the model, or ``whole`` and a kernel's result differs. The
            model is then as it was.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    except ImportError as error:  # it imports internals of transformers, and supports only some versions
        raise VersionsDiffer(
            f"{_name()} cannot be imported beside transformers {metadata.version('transformers')} ({error})"
        ) from error

    family = model.config.model_type
    if family not in KNOWN:
        raise UnknownFamily(f"{_name()} does not know models of type {family}")
    apply = KNOWN[family]
    options = _options(model, inspect.signature(apply).parameters)
    own = {module: {name: vars(module)[name] for name in PATCHED if name in vars(module)} for module in model.modules()}
    try:
        with _transformers_unchanged() as replaced:
            apply(model=model, **options)
        options["rope"] = _replace_functions(model, replaced) > 0
        differences = _differences(model, device)
        limit = 1e-3 if model.dtype == torch.float32 else 0.05
        wrong = {name: difference for name, difference in differences.items() if not difference <= limit}
        if wrong and whole:
            raise ResultsDiffer(f"with {_name()} the output of {_listed(wrong)} from the model's own")
    except NotFused:
        _restore(own)
        raise
    _restore({module: names for module, names in own.items() if type(module).__name__ in wrong})
    kernels = ", ".join(name for name, used in options.items() if used)
    largest = max((difference for name, difference in differences.items() if name not in wrong), default=0.0)
    said = f"{_name()} in the decoder layers: {kernels}; largest difference of a module's output {largest:.1e}"
    return f"{said}; these keep their own code: {_listed(wrong)} with the kernel" if wrong else said


def _listed(differences: dict[str, float]) -> str:
    return ", ".join(f"{name} differs by {difference:.3g} (relative RMS)" for name, difference in differences.items())


def _restore(own: dict[nn.Module, dict[str, Any]]) -> None:
    """Give modules back what Liger has replaced in them."""
    for module, names in own.items():
        for name in PATCHED:
            vars(module).pop(name, None)
        vars(module).update(names)


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
def _differences(model: PreTrainedModel, device: torch.device) -> dict[str, float]:
    """The largest relative RMS difference between a patched module's output and that of its own code, on a few tokens,
    by the name of the module's class."""
    differences: dict[str, float] = {}

    def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = type(module).forward(module, *args, **kwargs)
        found, wanted = ((x[0] if isinstance(x, tuple) else x).float() for x in (output, own))
        difference = (found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
        name = type(module).__name__
        differences[name] = max(difference.nan_to_num(nan=torch.inf).item(), differences.get(name, 0.0))

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
    return differences


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
