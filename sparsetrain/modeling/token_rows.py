"""Train the rows of single tokens in a frozen embedding and output head, beside adapters.

The embedding and the head stay as they are. Each gets a parameter ``token_rows`` ``[k, hidden]`` and a hook that takes
these rows in place of its own, so that no copy of the whole matrix is made and only ``k`` rows have a gradient. A head
that is tied to the embedding shares its parameter. On disk they are peft's ``trainable_token_indices``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsetrain.errors import ModelError
from sparsetrain.modeling.adapter_targets import has_tied_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, IDS = "token_rows", "token_ids"
ON_DISK = "token_adapter.trainable_tokens_delta"
"""peft's name of the rows."""


def row_layers(model: PreTrainedModel, *, embedding: bool) -> dict[str, nn.Module]:
    """The layers with a row for each token, by name: the embedding, if asked for, and a head that is not tied to it.

    Raises:
        ModelError: A layer is of a kind whose rows cannot be replaced.
    """
    found = [model.get_input_embeddings()] if embedding else []
    head = model.get_output_embeddings()
    if head is not None and not has_tied_head(model):
        found.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in found:
        if not isinstance(layer, nn.Embedding | nn.Linear):
            raise ModelError(
                f"model.add_tokens: the rows of {names[id(layer)]} ({type(layer).__name__}) cannot be trained beside "
                "lora; set lora.train_embeddings: true, or train without lora"
            )
    return {names[id(layer)]: layer for layer in found}


def add_token_rows(model: PreTrainedModel, ids: Mapping[str, Sequence[int]]) -> None:
    """Give layers trained rows, which begin as their own.

    Args:
        ids: tokens by the name of the layer (:func:`row_layers`).
    """
    embedding = model.get_input_embeddings()
    tied = has_tied_head(model)
    for name, tokens in ids.items():
        layer: Any = model.get_submodule(name)
        _attach(layer, nn.Parameter(layer.weight.detach()[list(tokens)].clone()), tokens)
        if layer is embedding and tied:
            _attach(model.get_output_embeddings(), layer.token_rows, tokens)


def _attach(layer: Any, rows: Any, tokens: Sequence[int]) -> None:
    layer.register_parameter(ROWS, rows)
    layer.register_buffer(IDS, torch.tensor(list(tokens), device=rows.device), persistent=False)
    hook = _replace_embedded if isinstance(layer, nn.Embedding) else _replace_logits
    layer.token_hook = layer.register_forward_hook(hook)


def _replace_embedded(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[..., hidden]`` of tokens ``[...]``."""
    same = inputs[0][..., None] == layer.token_ids
    # Some embeddings are scaled (Gemma).
    rows = layer.token_rows * getattr(layer, "embed_scale", 1.0)
    return torch.where(same.any(-1, keepdim=True), rows[same.int().argmax(-1)].to(output.dtype), output)


def _replace_logits(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Logits ``[..., vocabulary]`` of hidden states ``[..., hidden]``."""
    bias = None if layer.bias is None else layer.bias[layer.token_ids]
    return output.index_copy(-1, layer.token_ids, F.linear(inputs[0], layer.token_rows, bias))


def layers_with_rows(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have trained rows, by name."""
    yield from ((name, layer) for name, layer in model.named_modules() if ROWS in layer._parameters)


def own_rows(model: PreTrainedModel) -> list[str]:
    """The names of the rows in the model, without those that a tied head shares."""
    named = dict(model.named_parameters())
    return [name for name in named if name.rpartition(".")[2] == ROWS]


def merge_token_rows(model: PreTrainedModel) -> None:
    """Write the rows into their layers' weights, which are ordinary layers again."""
    for _, layer in list(layers_with_rows(model)):
        with torch.no_grad():
            layer.weight[layer.token_ids] = layer.token_rows.to(layer.weight.dtype)
        layer.token_hook.remove()
        del layer.token_hook, layer._parameters[ROWS], layer._buffers[IDS]


def share_token_rows(model: PreTrainedModel) -> None:
    """Let a tied head share the embedding's rows again, after they were replaced by others."""
    embedding: Any = model.get_input_embeddings()
    if ROWS in embedding._parameters and has_tied_head(model):
        model.get_output_embeddings().token_rows = embedding.token_rows
