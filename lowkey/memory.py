"""How much memory this process can still have, as the system and its container allow."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CONTROLS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files of a container's memory group with its limit, what is used, and of what kinds: of version 2, and of version 1,
where no limit is a huge number."""


def host_memory() -> int:
    """Bytes that can still be allocated on the CPU. What files left in memory counts as free: it goes when something
    else needs the room."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise RuntimeError(f"{_MEMINFO} has no MemAvailable")
    for limit_file, used_file, kinds in _CONTROLS:
        limit, used = _number(_CGROUP / limit_file), _number(_CGROUP / used_file)
        if limit is not None and used is not None:
            available = min(available, max(limit - used + _cached(_CGROUP / kinds), 0))
    return available


def _cached(file: Path) -> int:
    """Bytes of files that the memory group has in memory."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def _number(file: Path) -> int | None:
    """The number in a control file; None where there is none or it says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
