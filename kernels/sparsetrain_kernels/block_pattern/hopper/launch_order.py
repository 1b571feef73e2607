"""In which order the backward kernels work through KV heads and tiles. A rule by size: measured, not searched for."""

MANY_PROGRAMS = 4096
"""Of a kernel that only reads what key tiles share."""
MANY_ADDING_PROGRAMS = 2048
"""Of one that adds to it as well."""


def heads_together(programs: int, heads: int, many: int = MANY_PROGRAMS) -> int:
    """KV heads whose tiles take turns: one at a time, or all.

    One at a time, the queries, output gradients and sums that neighbouring key tiles share are still in the L2 cache:
    at 131,072 tokens the fused kernel takes 27.5 instead of 29.6 ms. But then the longest columns, those of the sinks,
    do not all come first, and where a launch is only a few programs an SM, the last ones end late: at 8,192 tokens 1.41
    instead of 1.09 ms.
    """
    return 1 if programs >= many else heads
