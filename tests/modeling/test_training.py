"""What training relies on: isolated documents, complete gradients, no mask of queries by keys, wrappers that work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsetrain.errors import ModelError
from sparsetrain.modeling import sparsify

POWER = {"method": "power", "block": 4, "window": 2, "sinks": 1}
LENGTHS = [17, 1, 30, 6]
SETTINGS = {"rtol": 1e-4, "atol": 1e-4}


def packed(tokens):
    """Documents of several lengths in one row: their ids one by one, and the row's arguments."""
    documents = [tokens(length, seed=length) for length in LENGTHS]
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return documents, {"input_ids": torch.cat(documents, 1), "position_ids": position_ids}, cu_seqlens


@pytest.mark.parametrize("given", ["cu_seqlens", "cu_seq_lens_q", "position_ids"])
def test_packed_documents_equal_separate_ones(given, family, tiny, tokens):
    model = sparsify(tiny(family), POWER)
    documents, row, cu_seqlens = packed(tokens)
    extra = {} if given == "position_ids" else {given: cu_seqlens.long() if given == "cu_seq_lens_q" else cu_seqlens}
    logits = model(**row, **extra, use_cache=False).logits
    expected = torch.cat([model(document, use_cache=False).logits for document in documents], 1)
    torch.testing.assert_close(logits, expected, **SETTINGS)


def test_a_packed_row_is_not_cut_out_and_joined_again(tiny, tokens):
    copies = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name, ndim = func._schema.name, out.ndim if isinstance(out, torch.Tensor) else 0
            dim = {"aten::cat": args[1:2], "aten::slice_backward": args[2:3]}.get(name)
            if ndim == 4 and dim is not None and (dim or (0,))[0] == 0:
                copies.append(name)
            return out

    model = sparsify(tiny("llama"), POWER).train()
    _, row, cu_seqlens = packed(tokens)
    with Rows():
        model(**row, cu_seqlens=cu_seqlens, use_cache=False).logits.sum().backward()
    assert copies == []


def test_packed_rows_of_a_batch_are_told_apart_by_their_positions(tiny, tokens):
    model = sparsify(tiny("llama"), POWER)
    _, row, _ = packed(tokens)
    other = tokens(sum(LENGTHS), seed=9)
    logits = model(
        input_ids=torch.cat([row["input_ids"], other]),
        position_ids=torch.cat([row["position_ids"], torch.arange(sum(LENGTHS))[None]]),
        use_cache=False,
    ).logits
    torch.testing.assert_close(logits[:1], model(**row, use_cache=False).logits, **SETTINGS)
    torch.testing.assert_close(logits[1:], model(other).logits, **SETTINGS)


def test_gradients_reach_every_parameter_and_equal_those_of_separate_documents(family, tiny, tokens):
    config = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = sparsify(tiny(family, **config), POWER).train()
    separate = copy.deepcopy(model)
    documents, row, cu_seqlens = packed(tokens)
    model(**row, cu_seqlens=cu_seqlens, use_cache=False).logits.square().sum().backward()
    for document in documents:
        separate(document, use_cache=False).logits.square().sum().backward()

    for (name, parameter), other in zip(model.named_parameters(), separate.parameters(), strict=True):
        assert parameter.grad is not None, name
        if "k_proj.bias" not in name:  # a shift of all keys' logits cancels in the softmax
            assert parameter.grad.abs().max() > 0, name
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


def test_activation_checkpointing_gives_the_same_gradients(tiny, tokens):
    model = sparsify(tiny("llama"), POWER).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    _, row, cu_seqlens = packed(tokens)
    for one in (model, checkpointed):
        one(**row, cu_seqlens=cu_seqlens, use_cache=False).logits.square().sum().backward()
    for parameter, other in zip(model.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Watches the number of elements of every tensor an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_mask_of_queries_by_keys_is_built(family, tiny, tokens):
    length = 4096
    model = tiny(family, head_dim=16, max_position_embeddings=length)
    sparsify(model, {"method": "power", "block": 64, "window": 2, "sinks": 1})
    with LargestTensor() as largest:
        model.model(tokens(length), use_cache=False).last_hidden_state.sum().backward()
    assert 0 < largest.elements < length * length / 2


def test_a_peft_adapter_trains_around_the_method(tiny, tokens):
    peft = pytest.importorskip("peft")
    model = sparsify(tiny("llama"), POWER)
    expected = model(tokens(45)).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.testing.assert_close(wrapped(tokens(45)).logits, expected, **SETTINGS)

    wrapped.train()(tokens(45), labels=tokens(45), use_cache=False).loss.backward()
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.grad is not None for p in trainable.values())
    assert any(p.grad.abs().max() > 0 for p in trainable.values())


def test_a_peft_model_can_be_sparsified_after_wrapping(tiny, tokens):
    peft = pytest.importorskip("peft")
    expected = sparsify(tiny("llama"), POWER)(tokens(45)).logits
    wrapped = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    torch.testing.assert_close(sparsify(wrapped.eval(), POWER)(tokens(45)).logits, expected, **SETTINGS)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "attention",
    [
        POWER,
        {"method": "full"},
        {"method": "sparsek", "topk": 8, "window": 4, "sinks": 1},
        {"method": "recycled", "every": 4, "keep": 6, "sinks": 1, "recent": 2},
    ],
    ids=lambda attention: attention["method"],
)
def test_a_padded_batch_trains_as_its_rows_alone(attention, side, tiny, tokens):
    model = sparsify(tiny("llama"), attention).train()
    separate = copy.deepcopy(model)
    documents = [tokens(length, seed=length) for length in (17, 30, 6)]
    ids, mask, labels = *torch.zeros(2, 3, 30, dtype=torch.long), torch.full((3, 30), -100)
    for row, document in enumerate(documents):
        place = slice(0, document.shape[1]) if side == "right" else slice(30 - document.shape[1], 30)
        ids[row, place] = labels[row, place] = document[0]
        mask[row, place] = 1
        labels[row, place.start] = -100  # padding does not predict it
    model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for document in documents:
        share = (document.shape[1] - 1) / sum(document.shape[1] - 1 for document in documents)
        (share * separate(document, labels=document, use_cache=False).loss).backward()
    for (name, parameter), other in zip(model.named_parameters(), separate.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_a_padded_row_may_not_hold_several_documents(tiny, tokens):
    model = sparsify(tiny("llama"), POWER)
    mask = torch.tensor([[0] * 2 + [1] * 18])
    positions = torch.tensor([[1, 1, *range(10), *range(8)]])
    with pytest.raises(ModelError, match="padded row holds several documents"):
        model(tokens(20), attention_mask=mask, position_ids=positions, use_cache=False)


def test_packed_documents_may_not_share_a_cache(tiny, tokens):
    _, row, cu_seqlens = packed(tokens)
    model = sparsify(tiny("llama"), POWER)
    with pytest.raises(ModelError, match="use_cache=False"):
        model(**row)
    with pytest.raises(ModelError, match="use_cache=False"):
        model(**row, cu_seqlens=cu_seqlens, use_cache=True)


def test_attention_dropout_is_refused_where_it_would_apply(tiny, tokens):
    model = sparsify(tiny("llama", attention_dropout=0.1), POWER)
    model(tokens(20))
    with pytest.raises(ModelError, match="attention_dropout"):
        model.train()(tokens(20))
