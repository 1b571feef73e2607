"""How much host memory a process may still take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ControlGroup:
    """Where the kernel says what a container may use, and what it uses, in one version of control groups."""

    folder: Path
    limit: str
    use: str
    cache: str
    """Field of ``memory.stat``: what files take, which is given back when it is needed ..."""
    shared: str
    """... but for this part of it, which is memory under the name of a file."""

    def available(self) -> int | None:
        """Bytes up to the limit; None where there is no such group, or no limit."""
        try:
            limit, use = (int((self.folder / name).read_text()) for name in (self.limit, self.use))
            fields = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
            return max(limit - use + int(fields[self.cache]) - int(fields[self.shared]), 0)
        except (OSError, ValueError, KeyError):
            return None


CONTROL_GROUPS = (
    ControlGroup(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file", "shmem"),
    ControlGroup(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
        "total_shmem",
    ),
)


def available_host_memory() -> int:
    """Bytes that can be taken without swapping, or without exceeding the limit of this container."""
    limits = [psutil.virtual_memory().available, *(group.available() for group in CONTROL_GROUPS)]
    return min(limit for limit in limits if limit is not None)
