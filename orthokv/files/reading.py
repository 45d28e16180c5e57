"""JSON and safetensors files, read with their damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from orthokv.spec.errors import InvalidCheckpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or `InvalidCheckpoint` naming the file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path.name} is missing from {path.parent}") from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{path.name} is not readable JSON ({error})") from error
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path.name} does not hold a JSON object")
    return data


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file, checked for finiteness, or `InvalidCheckpoint` naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path.name} is missing from {path.parent}") from None
    except Exception as error:  # safetensors raises its own SafetensorError, and OSError for short files
        raise InvalidCheckpoint(f"{path.name} is truncated or damaged ({error})") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidCheckpoint(f"{path.name}: tensor {name} holds values that are not finite")
    return tensors, metadata
