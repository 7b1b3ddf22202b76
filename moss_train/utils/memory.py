"""Find how much memory this process may use, inside a container too."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, within the limits of the process: what can still be used, and the total."""

    available: int
    total: int


def available_memory_bytes() -> int:
    """Return how many bytes this process can still take before it is swapped or killed."""
    return memory().available


def memory(proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return the machine's memory, narrowed by the control groups (version 2) that this process is in.

    Args:
        proc: the proc file system.
        cgroup_root: the root of the unified control group hierarchy.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        available, total = kibibytes["MemAvailable"] * 1024, kibibytes["MemTotal"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE")
        available, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((cgroup_root / line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    # Its own group and all groups above it, as each of them may set a limit.
    for group in [own, *own.parents] if own is not None else []:
        if not group.is_relative_to(cgroup_root):
            break
        try:
            limit = int((group / "memory.max").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # "max" is no limit
        available, total = min(available, max(0, limit - _used(group))), min(total, limit)
    return Memory(available, total)


def _used(group: Path) -> int:
    """Return the bytes that count against the limit, without the file cache that the kernel drops under pressure."""
    try:
        current = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        inactive = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(0, current - inactive)
    except (OSError, ValueError, IndexError):
        return 0
