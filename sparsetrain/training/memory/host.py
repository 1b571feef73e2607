"""How much host memory a process may take, and how much is left of it."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ControlGroup:
    """Where the kernel says what a container may use, and what it uses, in one version of control groups."""

    folder: Path
    limit: str
    """Its files that hold the limit ..."""
    use: str
    """... and what is in use."""
    cache: str
    """Field of ``memory.stat``: what files take, which is given back when it is needed ..."""
    shared: str
    """... but for this part of it, which is memory under the name of a file."""

    def allowed(self) -> int | None:
        """Bytes of the limit; None where there is no such group, or no limit."""
        return self._read(self.limit)

    def available(self) -> int | None:
        """Bytes up to the limit; None as above."""
        limit, use = self._read(self.limit), self._read(self.use)
        if limit is None or use is None:
            return None
        try:
            fields = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
            return max(limit - use + int(fields[self.cache]) - int(fields[self.shared]), 0)
        except (OSError, ValueError, KeyError):
            return None

    def _read(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):  # no such controller, or "max"
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


def allowed_host_memory() -> int:
    """Bytes that this process may use in all: the machine's, or what its container or a limit of its own leaves it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(group.allowed() for group in CONTROL_GROUPS)]
    own = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min(limit for limit in (*limits, *own) if limit is not None and limit != resource.RLIM_INFINITY)
