"""Every allocation of a real training step, without the memory: fake tensors, whose storages are counted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from sparsetrain.training.loss import CausalLMLoss
from sparsetrain.training.memory.chunks import chunks_of
from sparsetrain.training.memory.tiled_mlp import _Tiled

ATTENTION = "plan_test"


class Storages(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return out


class _Attention(torch.autograd.Function):
    """What our attention operations allocate and keep: an output like the queries, a log-sum-exp, three gradients."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, lse = torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Adapter(torch.nn.Module):
    """LoRA as peft computes it."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        dtype = base.weight.dtype
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


def allocated(
    config: PretrainedConfig,
    tokens: int,
    *,
    checkpointed: bool,
    loss_chunk: int,
    mlp_chunk: int | None,
    rank: int | None,
) -> int:
    """Peak bytes of weights, gradients and activations in one forward and backward pass in bf16."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    config._attn_implementation = ATTENTION
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if rank is not None:
            model.requires_grad_(False)
            for layer in model.model.layers:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    setattr(layer.self_attn, name, _Adapter(getattr(layer.self_attn, name), rank))
        if mlp_chunk is not None:
            for layer in model.model.layers:
                layer.mlp.forward = _Tiled(layer.mlp, layer.mlp.forward, chunks_of(tokens, mlp_chunk))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        loss = CausalLMLoss(model, loss_chunk)
        ids = torch.zeros((1, tokens), dtype=torch.int64)
        batch = {
            "input_ids": ids,
            "position_ids": torch.arange(tokens)[None],
            "cu_seqlens": None,
            "positions": torch.arange(tokens - 1),
            "targets": ids[0, 1:],
            "num_chunks": chunks_of(tokens, loss_chunk),
        }
        with Storages() as storages:
            for parameter in model.parameters():
                storages.count(parameter)
            loss(**batch).backward()
    return storages.peak
