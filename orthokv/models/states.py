"""Hidden states between the layers of a model, and layers that are replaced for a while."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokv.spec.errors import StorageError

_spill_folder: ContextVar[Path | None] = ContextVar("spill_folder", default=None)


@contextmanager
def spilled_to(folder: Path | None) -> Iterator[None]:
    """Hidden states of walks that begin inside the block are kept in files in `folder` (which exists), not in memory.

    The files have no name and vanish with the walk. None keeps them in memory, on the model's device.
    """
    token = _spill_folder.set(folder)
    try:
        yield
    finally:
        _spill_folder.reset(token)


def empty_states(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for hidden states, on `device` or where `spilled_to` says (then a tensor of the CPU's).

    Raises:
        StorageError: the folder cannot be written, or is too small.
    """
    folder = _spill_folder.get()
    if folder is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    numbers = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="orthokv-states-") as file:
            # Reserved now where the system can: on a disk that is full later, writing a page would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype).view(*shape)
    except OSError as error:
        raise StorageError(f"activations cannot be spilled to {folder}: {error.strerror}") from error


def positions_from(start: int, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What a forward is told of `tokens` `[..., T]` that begin at `start`: nothing at 0, where it counts itself."""
    if start == 0:
        return {}
    return {"position_ids": torch.arange(start, start + tokens.shape[-1], device=device).unsqueeze(0)}


@contextmanager
def layers_replaced(layers: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The model's own forward around other layers: what comes before and after them is never re-implemented here."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def pass_on(*, tuples: bool) -> Callable[..., Any]:
    """A layer that returns what it is given, in the form that the layers of a model have: a few return a tuple."""

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        return (hidden_states, None) if tuples else hidden_states

    return forward
