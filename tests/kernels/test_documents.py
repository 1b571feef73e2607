"""What follows from the bounds of documents is found once, and again when they change."""

from __future__ import annotations

import gc
import weakref

import torch
from sparsetrain_kernels.dense import causal_attention
from sparsetrain_kernels.documents import from_documents, known_bounds
from sparsetrain_kernels.inputs import AttentionInputs, document_bounds

CPU = torch.device("cpu")


def packed(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def test_the_bounds_are_those_of_every_token_and_found_once() -> None:
    cu_seqlens = packed(0, 3, 3, 10)
    found = known_bounds(10, cu_seqlens, CPU)
    assert all(torch.equal(*pair) for pair in zip(found, document_bounds(10, cu_seqlens, CPU), strict=True))
    assert known_bounds(10, cu_seqlens, CPU) is found


def test_another_tensor_of_the_same_documents_is_asked_anew() -> None:
    assert known_bounds(10, packed(0, 10), CPU) is not known_bounds(10, packed(0, 10), CPU)


def test_documents_that_change_in_place_are_found_again() -> None:
    cu_seqlens = packed(0, 3, 10)
    before = known_bounds(10, cu_seqlens, CPU)
    cu_seqlens[1] = 7
    start, _ = known_bounds(10, cu_seqlens, CPU)
    assert start.tolist() == [0] * 7 + [7] * 3
    assert before[0].tolist() == [0] * 3 + [3] * 7


def test_different_questions_have_different_answers() -> None:
    cu_seqlens = packed(0, 4)
    assert [from_documents(cu_seqlens, (name,), lambda name=name: name) for name in ("a", "b", "a")] == ["a", "b", "a"]


def test_without_a_version_nothing_is_kept() -> None:
    with torch.inference_mode():
        cu_seqlens = packed(0, 3, 10)
        known_bounds(10, cu_seqlens, CPU)
        cu_seqlens[1] = 7
        assert known_bounds(10, cu_seqlens, CPU)[0][5] == 0


def test_nothing_outlives_the_documents() -> None:
    cu_seqlens = packed(0, 3, 10)
    found = weakref.ref(known_bounds(10, cu_seqlens, CPU)[0])
    del cu_seqlens
    gc.collect()
    assert found() is None


def test_the_layers_of_full_attention_ask_for_the_documents_once(monkeypatch) -> None:
    """On a GPU the host would wait for each answer."""
    asked = []
    documents = AttentionInputs.documents
    monkeypatch.setattr(AttentionInputs, "documents", lambda inputs: asked.append(None) or documents(inputs))
    query, cu_seqlens = torch.randn(1, 2, 10, 8), packed(0, 3, 10)
    first, again = (causal_attention(query, query, query, cu_seqlens=cu_seqlens) for _ in range(2))
    assert (len(asked), torch.equal(first, again)) == (1, True)
    cu_seqlens[1] = 7
    changed = causal_attention(query, query, query, cu_seqlens=cu_seqlens)
    assert torch.equal(changed, causal_attention(query, query, query, cu_seqlens=packed(0, 7, 10)))
