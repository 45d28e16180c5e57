"""Around every request: how long it took, in metrics and in one line of the log."""

from __future__ import annotations

import re
import time

import structlog
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.infra.counted import HTTP_REQUEST_SECONDS

_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}
_PROBES = {"/livez", "/readyz"}
_ID = re.compile(r"[a-z]{1,12}_[0-9a-z]{26}")

log = structlog.get_logger("app.requests")


class Requests:
    """Measures to the beginning of the answer: a download or an event stream lasts as long as its reader likes.

    Long polls wait because they were asked to; their route ends in `?wait`, so that they can be told apart.
    """

    def __init__(self, app: ASGIApp, *, log_requests: bool) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, seconds = time.perf_counter(), 500, None

        async def watched(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - began
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if seconds is None:  # it failed, and is answered further out
                seconds = time.perf_counter() - began
            route = route_of(scope)
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            HTTP_REQUEST_SECONDS.labels(method, route, status).observe(seconds)
            if self._log_requests and route not in _PROBES:
                log.info(
                    "request.answered",
                    method=method,
                    route=route,
                    status=status,
                    seconds=round(seconds, 4),
                    total_seconds=round(time.perf_counter() - began, 4),
                    **_ids(scope),
                )


def route_of(scope: Scope) -> str:
    """The template of the route that took the request; never the path, which a client chooses."""
    template: str | None = getattr(scope.get("route"), "path", None)
    if template is None:
        return "none"
    return f"{template}?wait" if "wait" in QueryParams(scope.get("query_string", b"")) else template


def _ids(scope: Scope) -> dict[str, str]:
    """Ids of the path, under the names that logs have for them everywhere; only what is an id."""
    found: dict[str, str] = scope.get("path_params") or {}
    return {name: value for name, value in found.items() if _ID.fullmatch(str(value))}
