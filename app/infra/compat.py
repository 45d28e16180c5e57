"""Private doors of other packages that the service goes through, each with its reason: what to look at when one is updated.

`pyproject.toml` bounds these packages at the minor version that was tested.
"""

from __future__ import annotations

from typing import Any

# uvicorn lacks the ASGI extension `http.response.zerocopysend`: `app.http.sendfile` adds it to the protocol's own class.
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["H11Protocol", "celery_state"]


def celery_state() -> Any:
    """The module whose flags stop a Celery worker that runs in a thread; it has no public switch."""
    from celery.worker import state

    return state
