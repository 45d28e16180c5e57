"""A step's request as a supervisor would hand it to the child."""

from __future__ import annotations

from typing import Any

from orthokv.spec.budget import Budget
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from workers.protocol import ModelRef, Request


def step_request(step: str, *, model: str = "m", **changes: Any) -> Request:
    """A request of one step of a small job; `changes` are fields of it."""
    fields: dict[str, Any] = {
        "job_id": "job_1",
        "workdir": "/nowhere",
        "dataset": [],
        "settings": FitSettings("eigen", num_samples=4, sequence_length=64),
        "target": Target(Budget("kept", 0.5)),
        "layers": [],
        "inputs": {},
        "device": "cpu",
        "spill": False,
    }
    return Request(step=step, model=ModelRef(id=model, revision=None), **fields | changes)
