"""What happens around every request: a request id, and the refusal of foreign hosts and origins."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import unquote, urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.errors import Code, Problem, render
from app.infra.ids import new_id
from app.schemas import is_storable


class RequestIds:
    """Give each request an id, in the log, in problems and in the `X-Request-Id` header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, with_id)


class PlainQueries:
    """Refuse a query with a character that no stored text has: it can name nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope.get("query_string", b"").decode("latin-1")
        if query and not is_storable(unquote(query, errors="surrogateescape")):
            problem = Problem(Code.INVALID_REQUEST, "The query holds a character that is not text.")
            response = render(problem, path=scope["path"], request_id=scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


class LocalOnly:
    """Answer only requests that name this server, from no web page of another one.

    A loopback server is reachable from every page that its user's browser shows: by a name that was made to
    resolve to 127.0.0.1 (the Host header gives it away) or by a plain cross-site POST (the Origin header
    does).
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(Headers(scope=scope))) is not None:
            response = render(problem, path=scope["path"], request_id=scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> Problem | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(f"//{hosts[0]}"):
            return Problem(Code.INVALID_HOST, "This server does not answer to that host name.")
        if (origin := headers.get("origin")) is not None and not self._is_ours(origin):
            return Problem(Code.FOREIGN_ORIGIN, "Requests from pages of other sites are refused.")
        return None

    def _is_ours(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return False
        return host is not None and (host in self._allowed or f"[{host}]" in self._allowed)
