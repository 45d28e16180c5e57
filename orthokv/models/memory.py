"""How much memory there is, and how much of it a run has used."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Memory that a model may take now: free on an accelerator; on the host what can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, _container_bytes())


def _container_bytes() -> int:
    """What a container's limit leaves; pages of files that it only caches count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit) - used + (int(cached[1]) if cached else 0)


def peak_bytes() -> int:
    """Largest resident size of this process so far, mapped pages of files included."""
    try:
        # Of this program alone: what getrusage says includes the size of the process that started it.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def peak_device_bytes() -> int:
    """Most memory that tensors on CUDA devices took at any time; 0 without one."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
