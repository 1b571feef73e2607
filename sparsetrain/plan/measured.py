"""Every number of a plan that was measured rather than derived, with where it comes from; but for those of an attention
method, which are beside it (``costs`` in sparsetrain/methods).

All on one NVIDIA H200 in bf16, 2026-11-24, by the commands in docs/performance.md unless said otherwise. For another
card the rates are scaled by its peak and its bandwidth.
"""

from __future__ import annotations

BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: blocks of 64 with an 8-bit scale, whose own scales cover 256 blocks (QLoRA, 2305.14314)."""

BYTES_8BIT = 1.0
"""Bytes of a weight in LLM.int8; a scale for each row vanishes beside it."""

CONTEXT = 1.0 * 2**30
"""Device memory in bytes outside of torch's allocator: CUDA context, NCCL, cuBLAS workspaces. An estimate."""

MEASURED_PEAK, MEASURED_BANDWIDTH = 989.4e12, 4.8e12
"""Data-sheet peak in bf16 and bandwidth of the H200 that everything below was measured on."""

MATRIX_SHARE = 0.66
"""Fraction of peak FLOP/s that matrix products reach in training steps; an isolated product reached 0.80. Set between
what fits `sparsetrain bench step` with Llama-3.2-1B's shape (0.62: 874 and 3,599 ms with PowerAttention at 32,768 and
131,072 tokens, 1,494 and 14,699 with SDPA, of which a plan says 835, 3,440, 1,449 and 14,413) and with Qwen3-8B's,
whose products are larger (0.70: 13.4 s at 131,072 tokens with adapters and tiled MLPs, 2026-12-01, of which a plan
says 14.1)."""

BANDWIDTH_SHARE = 0.70
"""Fraction of bandwidth that elementwise operations reach in training steps. An isolated copy reached 0.88."""

LINK_SHARE = 0.67
"""Fraction of link bandwidth that collectives reach: 300 of 450 GB/s on NVLink. An estimate, not measured."""

EXCHANGE_SHARE = 0.75
"""Fraction of link bandwidth that the all-to-all of ranks that share a row reaches: 340 of 450 GB/s for 5,120 MiB
between two H200s, 335 for 2,560 and 313 for 640 (`sparsetrain bench exchange`, 2026-12-01, less the copies, timed on
one card)."""

EXCHANGE_WAIT = 0.1e-3
"""Seconds of each all-to-all whatever it moves; the same run had 0.08e-3."""

GATHER_WAIT = 0.25e-3
"""Seconds that computation waits for each matrix that ZeRO-3 gathers, however well it is hidden. This and the next one
are from profiles of Qwen3-8B with adapters at 32,768 tokens on two H200s, 2026-11-28 (docs/performance.md): 0.15 to
0.48 s for 897 gathers."""

BESIDE_GATHERS = 0.05
"""Relative slowdown of computation while weights are gathered: products 6 to 10 %, other operations 4 %."""

HOST_OPTIMIZER = 25e9
"""Bytes per second and rank of the optimizer with states in host memory. An estimate, not measured."""

HOST_LINK = 40e9
"""Bytes per second between a GPU and pinned host memory (PCIe 5 x16). An estimate, not measured."""
