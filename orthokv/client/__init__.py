"""The Python client of a running OrthoKV service, synchronous and asynchronous::

    from orthokv.client import OrthoKV

    with OrthoKV("http://127.0.0.1:8000") as client:
        dataset = client.datasets.upload("calibration.jsonl")
        job = client.jobs.create({
            "model": {"id": "org/model"},
            "dataset": {"id": dataset.id},
            "budget": {"metric": "kept", "value": 0.25},
        })
        job = client.jobs.wait(job.id)
        client.checkpoints.download(job.result.checkpoint_id, "checkpoint")

Every body is typed (`orthokv.client.models`, made from the OpenAPI document). It needs the extra `orthokv[client]`, and
neither torch nor the server's packages are loaded.
"""

from __future__ import annotations

from orthokv.client import models
from orthokv.client.asynchronous import AsyncOrthoKV
from orthokv.client.errors import (
    ApiError,
    ClientError,
    Conflict,
    DigestMismatch,
    DownloadInUse,
    Forbidden,
    InvalidRequest,
    NotEnoughSpace,
    NotFound,
    ServerError,
    StoreRefused,
    TokenUnreadable,
    TooManyRequests,
    Unauthenticated,
    UnexpectedAnswer,
    Unreachable,
)
from orthokv.client.protocol import Retry
from orthokv.client.synchronous import OrthoKV

__all__ = [
    "ApiError",
    "AsyncOrthoKV",
    "ClientError",
    "Conflict",
    "DigestMismatch",
    "DownloadInUse",
    "Forbidden",
    "InvalidRequest",
    "NotEnoughSpace",
    "NotFound",
    "OrthoKV",
    "Retry",
    "ServerError",
    "StoreRefused",
    "TokenUnreadable",
    "TooManyRequests",
    "Unauthenticated",
    "UnexpectedAnswer",
    "Unreachable",
    "models",
]
