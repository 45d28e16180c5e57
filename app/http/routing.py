"""Routes whose body is small."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive


class BoundedRoute(APIRoute):
    """A route that reads JSON, of at most `max_body_bytes`, declared or not.

    FastAPI's own limit answers in plain text; here a body that is too large is a problem like any other.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            limit: int = request.app.state.settings.max_body_bytes
            return await handle(Request(request.scope, _limited(request.receive, limit)))

        return bounded


def _limited(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413)
        return message

    return counted
