"""The implementations of attention that are measured. Each gets a problem ready; what it cannot do it says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from sparsetrain_kernels import block_pattern_attention, causal_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.bench.problem import CausalProblem, Problem, Tensors
from sparsetrain.bench.timing import Unavailable, once_ms, peak

P = TypeVar("P", bound=CausalProblem)
AnyP = TypeVar("AnyP", bound=CausalProblem, contravariant=True)
Attention = Callable[..., Tensor]


class Layout(NamedTuple):
    """How an implementation wants its tensors: from ``[batch, heads, tokens, head_dim]`` and back to it."""

    arrange: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]


HEADS_FIRST = Layout(lambda tensor: tensor, lambda tensor: tensor)
TOKENS_FIRST = Layout(lambda tensor: tensor.transpose(1, 2).contiguous(), lambda tensor: tensor.transpose(1, 2))
PACKED = Layout(lambda tensor: tensor[0].transpose(0, 1).contiguous(), lambda tensor: tensor.transpose(0, 1)[None])


@dataclass(frozen=True)
class Prepared:
    """An implementation that is ready for one problem."""

    attend: Attention
    """From query, key and value, all in ``layout``, to the output; from the scores too where there is ``select``."""
    layout: Layout = HEADS_FIRST
    repeat: int = 1
    """How often each KV head is repeated beforehand, for an implementation that does not share them."""
    mask_ms: float | None = None
    """Time to build the mask once everything is compiled."""
    mask_bytes: int | None = None
    """Memory allocated at the peak of building it."""
    select: Callable[[Tensor], Tensor] | None = None
    """The part of ``attend`` that selects keys, from scores to something with a gradient that has their shape."""
    note: str = ""

    def leaves(self, tensors: Tensors) -> tuple[list[Tensor], Tensor]:
        """The arguments of ``attend``, requiring gradients, and the gradient that arrives at the output."""
        query, key, value, upstream, scores = tensors
        if self.repeat > 1:
            key, value = (tensor.repeat_interleave(self.repeat, 1) for tensor in (key, value))
        inputs = [self.layout.arrange(tensor).detach().requires_grad_() for tensor in (query, key, value)]
        if self.select is not None and scores is not None:
            inputs.append(scores.detach().requires_grad_())
        return inputs, self.layout.arrange(upstream)


@dataclass(frozen=True)
class Opponent(Generic[AnyP]):
    """One implementation, ours among them."""

    name: str
    title: str
    sparse: bool
    """Whether it computes the pattern or the selection; otherwise everything before a token."""
    prepare: Callable[[AnyP, Tensors], Prepared]
    """Raises whatever goes wrong; :class:`Unavailable` with the reason where the machine lacks something."""
    devices: tuple[str, ...] = ("cuda",)
    packed: tuple[bool, ...] = (False, True)
    """Whether it takes single sequences, packed documents, or both."""


def opponents_for(device: str, packed: bool) -> dict[str, Opponent[Problem]]:
    """The implementations that fit, by name."""
    return {each.name: each for each in OPPONENTS if device in each.devices and packed in each.packed}


def _ours(problem: Problem, tensors: Tensors) -> Prepared:
    return _block_pattern(problem, "auto")


def _ours_triton(problem: Problem, tensors: Tensors) -> Prepared:
    return _block_pattern(problem, "triton")


def _block_pattern(problem: Problem, backend: str) -> Prepared:
    cu_seqlens, pattern = problem.cu_seqlens(), problem.pattern

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_pattern_attention(query, key, value, pattern, cu_seqlens=cu_seqlens, backend=backend)

    return Prepared(attend)


def _flex(problem: Problem, tensors: Tensors) -> Prepared:
    return _flex_attention(problem, None)


SOUND_BLOCK_SPARSE = "4.0.0b36"
"""The first FlashAttention 4 whose block-sparse backward pass has no race that makes some gradients wrong."""


def _flex_flash(problem: Problem, tensors: Tensors) -> Prepared:
    from packaging.version import Version

    _flash_attn_cute()
    installed = importlib.metadata.version("flash-attn-4")
    if Version(installed) < Version(SOUND_BLOCK_SPARSE):
        raise Unavailable(
            f"flash-attn-4 {installed} has a race in its block-sparse gradients; install {SOUND_BLOCK_SPARSE} or newer"
        )
    return _flex_attention(problem, {"BACKEND": "FLASH"})


def _flex_attention(problem: Problem, kernel_options: dict[str, Any] | None) -> Prepared:
    """FlexAttention, compiled for this problem's shapes alone."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    from sparsetrain.bench.flex import document_block_mask, listed_block_mask

    # Every shape is a compilation of its own, and dynamo gives up after a few of one function.
    torch._dynamo.reset()
    note, create = "mask from the lists", create_block_mask
    if problem.documents is not None:
        note, create = "mask by compiled create_block_mask", torch.compile(create_block_mask, dynamic=False)

    def build() -> BlockMask:
        if problem.documents is None:
            return listed_block_mask(problem.pattern, problem.length, problem.device)
        return document_block_mask(problem, create)

    build()  # compiles
    mask, mask_bytes = peak(build, problem.device)
    mask, mask_ms = once_ms(build, problem.device)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=kernel_options)

    return Prepared(attend, mask_ms=mask_ms, mask_bytes=mask_bytes, note=note)


def _cudnn(problem: CausalProblem, tensors: Tensors) -> Prepared:
    attend = _scaled_dot_product(SDPBackend.CUDNN_ATTENTION)
    try:
        attend(tensors.query, tensors.key, tensors.value)
    except RuntimeError as error:
        if "kernel" not in str(error) or problem.heads == problem.kv_heads:
            raise
        return Prepared(
            attend,
            repeat=problem.heads // problem.kv_heads,
            note="KV heads repeated before the measurement: this cuDNN does not share them",
        )
    return Prepared(attend)


def _flash_attention_2(problem: CausalProblem, tensors: Tensors) -> Prepared:
    return Prepared(_scaled_dot_product(SDPBackend.FLASH_ATTENTION))


def _sdpa(problem: CausalProblem, tensors: Tensors) -> Prepared:
    """Whatever torch's attention does here; one call a packed document."""
    cu_seqlens = problem.cu_seqlens()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, cu_seqlens=cu_seqlens)

    return Prepared(attend)


def _scaled_dot_product(backend: SDPBackend) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def _flash_attention_4(problem: CausalProblem, tensors: Tensors) -> Prepared:
    flash_attn_func = _flash_attn_cute().flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = flash_attn_func(query, key, value, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp along with it

    return Prepared(attend, TOKENS_FIRST)


def _varlen(problem: CausalProblem, tensors: Tensors) -> Prepared:
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn; it came in 2.10") from error
    assert problem.documents is not None
    bounds, longest = problem.cu_seqlens(), max(problem.documents)
    # Its signature has grown from version to version.
    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]
    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = True

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)

    return Prepared(attend, PACKED)


def _flash_attn_cute() -> Any:
    """FlashAttention 4."""
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        raise Unavailable("flash_attn.cute is not installed: pip install --pre flash-attn-4")
    return importlib.import_module("flash_attn.cute")


DENSE: tuple[Opponent[CausalProblem], ...] = (
    Opponent("cudnn", "cuDNN, dense", False, _cudnn, packed=(False,)),
    Opponent("fa2", "FA2 of torch, dense", False, _flash_attention_2, packed=(False,)),
    Opponent("fa4", "FA4, dense", False, _flash_attention_4, packed=(False,)),
    Opponent("varlen", "FA2 varlen, dense", False, _varlen, packed=(True,)),
    Opponent("sdpa", "SDPA of torch, dense", False, _sdpa, devices=("cpu",)),
)
OPPONENTS: tuple[Opponent[Problem], ...] = (
    Opponent("ours", "sparsetrain", True, _ours, devices=("cuda", "cpu")),
    Opponent("ours-triton", "sparsetrain, plain Triton", True, _ours_triton),
    Opponent("flex", "Flex, Triton", True, _flex),
    Opponent("flex-flash", "Flex, FLASH (FA4)", True, _flex_flash),
    *DENSE,
)
