"""Every number of a plan that was measured rather than derived, with where it comes from.

All on one NVIDIA H200 in bf16, 2026-11-24, by the commands in docs/performance.md unless said otherwise. For another
card the rates are scaled by its peak and its bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: blocks of 64 with an 8-bit scale, whose own scales cover 256 blocks (QLoRA, 2305.14314)."""

BYTES_8BIT = 1.0
"""Bytes of a weight in LLM.int8; a scale for each row vanishes beside it."""

CONTEXT = 1.0 * 2**30
"""Bytes of the device that torch's allocator never sees: CUDA's context, NCCL, cuBLAS workspaces. An allowance."""

MEASURED_PEAK, MEASURED_BANDWIDTH = 989.4e12, 4.8e12
"""Data-sheet peak in bf16 and bandwidth of the H200 that everything below was measured on."""

MATRIX_SHARE = 0.62
"""Share of the peak that the products of whole training steps reach; a bare product reached 0.80. With the next one it
is fitted to `sparsetrain bench step` (Llama-3.2-1B's shape): 874 and 3,599 ms with PowerAttention at 32,768 and 131,072
tokens, 1,494 and 14,699 with SDPA. A plan says 867, 3,568, 1,481 and 14,541. A loop of transformers and peft on
Qwen3-8B's shape with adapters took 6.54 and 57.5 s, of which a plan says 5.98 and 54.1."""

BANDWIDTH_SHARE = 0.70
"""Share of the bandwidth that elementwise operations reach in whole steps. A bare copy reached 0.88."""

LINK_SHARE = 0.67
"""Share of a link's rate that collectives reach: 300 of 450 GB/s on NVLink. An allowance, not measured."""

GATHER_WAIT = 0.25e-3
"""Seconds that computation waits for each matrix that ZeRO-3 gathers, however well it is hidden. This and the next one
are from profiles of Qwen3-8B with adapters at 32,768 tokens on two H200s, 2026-11-28 (docs/performance.md): 0.15 to
0.48 s for 897 gathers."""

BESIDE_GATHERS = 0.05
"""By what share computation is slower while weights are gathered beside it: products 6 to 10 %, the rest 4."""

HOST_OPTIMIZER = 25e9
"""Bytes a second and rank at which the optimizer runs through states in host memory. An allowance, not measured."""

HOST_LINK = 40e9
"""Bytes a second between a GPU and host memory, pinned (PCIe 5 x16). An allowance, not measured."""


@dataclass(frozen=True)
class AttentionRate:
    """Rates of one attention implementation at head dims 128 and 64, and its memory."""

    forward: tuple[float, float]
    """FLOP/s over visible pairs, heads of 128 and of 64."""
    backward: tuple[float, float]
    """The same for backward, counted as 2.5 times forward."""


DENSE = AttentionRate(forward=(605e12, 463e12), backward=(540e12, 425e12))
"""SDPA with cuDNN at 32,768 tokens (heads of 128: 14.5 ms forward, 55.1 both) and 131,072 (heads of 64: 152, 566)."""

BLOCKS = AttentionRate(forward=(578e12, 430e12), backward=(420e12, 384e12))
"""Block patterns with our Hopper kernels at 131,072 tokens: heads of 128 9.99 ms forward, 44.0 both; of 64 6.71 and
25.5."""

BLOCKS_PLAIN = AttentionRate(forward=(374e12, 278e12), backward=(279e12, 255e12))
"""The plain Triton kernels on the same problem: 15.4 ms forward, 66.5 both; heads of 64 scaled as BLOCKS."""

SPARSEK = AttentionRate(forward=(210e12, 158e12), backward=(228e12, 209e12))
"""SparseK, selection included, at 131,072 tokens, heads of 128. Heads of 64 were not measured: scaled as BLOCKS."""

# Memory that an attention call needs beyond its inputs, its output and their gradients.
DENSE_BYTES = 8.06
"""Bytes for each element of the queries: 4,128 MiB for 131,072 tokens of 32 heads of 128 (cuDNN), at every length."""

BLOCKS_BYTES = 32.0
"""Bytes for each token and query head: 128 MiB for 131,072 tokens of 32 heads, at every length."""

BLOCKS_SUMS = (4.0, 2.0**31)
"""Bytes for each element of the queries that the Hopper kernels add up in backward, heads of 128; and at most."""

SPARSEK_BYTES = (422.0, 126.0)
"""Bytes for each token and query head of 128: 422 MiB for 32,768 tokens of 32 heads. From there on the memory stays
until 126 bytes a token are more: 528 MiB for 131,072 tokens, 2,115 MiB for 524,288."""

SPARSEK_KNEE = 32768
"""Tokens up to which SparseK's memory grows at the first of those rates."""
