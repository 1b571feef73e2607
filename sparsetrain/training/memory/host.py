"""The host memory that a process may use, and the part that is available."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ControlGroup:
    """The files of one version of Linux control groups with a container's memory limit and usage."""

    folder: Path
    limit: str
    """The files with the limit."""
    use: str
    """The file with the usage."""
    cache: str
    """Field of ``memory.stat``: the page cache, which the kernel frees when needed."""
    shared: str
    """Field of ``memory.stat``: shared memory, a part of the page cache that cannot be freed."""

    def allowed(self) -> int | None:
        """The limit in bytes; None if there is no such group or no limit."""
        return self._read(self.limit)

    def available(self) -> int | None:
        """Available bytes up to the limit; None if there is no such group or no limit."""
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
    """Bytes that can be allocated without swapping and within the limit of this container."""
    limits = (group.available() for group in CONTROL_GROUPS)
    return min((psutil.virtual_memory().available, *(limit for limit in limits if limit is not None)))


def allowed_host_memory() -> int:
    """Bytes that this process may use in total: the machine's memory, or the limit of the container or process."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(group.allowed() for group in CONTROL_GROUPS)]
    own = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return min(limit for limit in (*limits, *own) if limit is not None and limit != resource.RLIM_INFINITY)
