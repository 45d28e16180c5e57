"""The same seed on the same machine gives the same bits, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the block PyTorch adds numbers up in an order that does not change from run to run.

    Gradients of fused attention are otherwise summed by atomic additions on a GPU, in any order. What the program had set
    before holds again after the block. On a CPU nothing is changed: its kernels are repeatable as they are.
    """
    if not torch.cuda.is_available():
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    # PyTorch refuses matrix products without it; products in a single stream are repeatable under any setting.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
