"""A model for calibration and evaluation, whole or streamed from disk."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from orthokv.models.geometry import geometry_of
from orthokv.models.repeatable import fix_workspaces
from orthokv.models.source import ModelSource, load_config, load_model, resolve_device
from orthokv.models.streaming import Streaming, stream_model, streaming_reason
from orthokv.spec.geometry import Geometry

log = logging.getLogger("orthokv")


def load(
    source: ModelSource,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    streaming: Streaming = "auto",
) -> PreTrainedModel:
    """The model for calibration and evaluation: float32 on a CPU, whose 16-bit arithmetic is slow and coarse.

    Where it does not fit (`streaming="auto"`) or is asked for (`"on"`), its decoder layers stay on disk until they are
    called, which is said in one line to the logger. Results are the same.
    """
    target = resolve_device(device)
    if target.type == "cuda":
        fix_workspaces()
    if dtype is None and target.type == "cpu":
        dtype = torch.float32
    reason = streaming_reason(source, target, dtype, streaming)
    if reason is None:
        return load_model(source, dtype=dtype, device=str(target))
    log.warning(reason)
    return stream_model(source, dtype=dtype, device=str(target))


def read_geometry(source: ModelSource) -> Geometry:
    """The geometry of a model on disk, from its configuration alone.

    Raises:
        UnsupportedModel: see `geometry_of`.
    """
    return geometry_of(load_config(source))
