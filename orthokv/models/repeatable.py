"""The same seed on the same machine gives the same bits, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def fix_workspaces() -> None:
    """Have cuBLAS work in buffers of one size, so that it chooses the same kernels in every process.

    Takes effect for matrix products that come after it in a process that has made none yet; what the environment says already
    stands.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside the block PyTorch adds numbers up in an order that does not change from run to run.

    Gradients of fused attention are otherwise summed by atomic additions on a GPU, in any order. PyTorch warns of an operation
    that has no such form there (mixtures of experts have one). What the program had set before holds again after the block.
    On a CPU nothing is changed: its kernels are repeatable as they are.
    """
    if not torch.cuda.is_available():
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    fix_workspaces()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
