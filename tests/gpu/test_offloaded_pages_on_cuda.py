"""Keys in host memory give what keys on the device give, to the last bit, and no step waits on the host."""

from __future__ import annotations

import pytest
import torch
from sparsetrain_kernels import block_pattern_attention

from sparsetrain.errors import ModelError
from sparsetrain.generation.offloaded import OffloadedMemory
from sparsetrain.generation.pages import PagedMemory
from sparsetrain.patterns import DilatedPattern, LongNetPattern, PowerPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATTERNS = {"power": PowerPattern(64, 3, 1), "dilated": DilatedPattern(64, 6, 4), "longnet": LongNetPattern(64)}
PROMPT, STEPS = 8192 + 17, 400


def test_a_step_is_not_captured_with_its_copies() -> None:
    memory = OffloadedMemory(PATTERNS["power"], lambda layer, query, key, value, **options: query, max_length=1024)
    text = [torch.randn(1, 2, 600, 64, device="cuda") for _ in range(3)]
    memory.attend(None, *(tensor[:, :, :599] for tensor in text), starts=None)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ModelError, match="a captured step would bring the same pages"), torch.cuda.graph(graph):
        memory.attend(None, *(tensor[:, :, 599:] for tensor in text), starts=None)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@torch.no_grad()
def test_steps_read_the_same_from_the_host(pattern) -> None:
    def attend(layer, query, key, value, **options):
        return block_pattern_attention(query, key, value, pattern, **options)

    generator = torch.Generator(device="cuda").manual_seed(0)
    text = [
        torch.randn(2, heads, PROMPT + STEPS, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    ]
    whole = PagedMemory(pattern, attend, max_length=2**14)
    half = OffloadedMemory(pattern, attend, max_length=2**14)

    def read(memory, start, stop):
        return memory.attend(None, *(tensor[:, :, start:stop].contiguous() for tensor in text), starts=None)

    assert torch.equal(read(whole, 0, PROMPT), read(half, 0, PROMPT))
    for memory in (whole, half):  # compiles, and makes the buffers of copies
        for at in range(PROMPT, PROMPT + 130):
            read(memory, at, at + 1)
        memory.rollback(64)
    at = PROMPT + 66
    try:
        torch.cuda.set_sync_debug_mode("error")
        pairs = [(read(whole, at, at + 1), read(half, at, at + 1)) for at in range(at, PROMPT + STEPS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected, found in pairs:
        assert torch.equal(expected, found)
    half.rollback(PROMPT - 1000 + STEPS)
    whole.reset()
    read(whole, 0, 1000)
    for at in range(1000, 1100):
        assert torch.equal(read(whole, at, at + 1), read(half, at, at + 1))
    assert half.nbytes() < whole.nbytes()
    assert half.host_nbytes() > PROMPT * 2 * 2 * 2 * 64 * 2
