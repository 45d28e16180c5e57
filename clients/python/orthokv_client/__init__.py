"""The Python client of a running OrthoKV service, synchronous and asynchronous::

    from orthokv_client import OrthoKV

    with OrthoKV("http://127.0.0.1:8000") as client:
        dataset = client.datasets.upload("calibration.jsonl")
        job = client.jobs.create({
            "model": {"id": "org/model"},
            "dataset": {"id": dataset.id},
            "budget": {"metric": "kept", "value": 0.25},
        })
        job = client.jobs.wait(job.id)
        client.checkpoints.download(job.result.checkpoint_id, "checkpoint")

Every body is typed (`orthokv_client.models`, made from the OpenAPI document). Neither torch, nor the library, nor the
server's packages are needed.
"""

from __future__ import annotations

from orthokv_client import models
from orthokv_client.asynchronous import AsyncOrthoKV
from orthokv_client.errors import (
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
from orthokv_client.protocol import Retry
from orthokv_client.synchronous import OrthoKV

__version__ = "0.1.0"

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
