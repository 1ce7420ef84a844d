"""How much memory a device has left."""

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: str) -> int:
    """Bytes that can still be allocated: on a GPU the driver's word, else what the system and the container allow."""
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise RuntimeError("/proc/meminfo has no MemAvailable")
    limit = _cgroup_number("memory.max")
    used = _cgroup_number("memory.current")
    return available if limit is None or used is None else min(available, max(limit - used, 0))


def _cgroup_number(name: str) -> int | None:
    """A control file of this process's memory group (version 2); None where there is none or it says "max"."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
