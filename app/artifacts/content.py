"""The response that carries a file's bytes, whole or in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, Header, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.artifacts.ranges import NotSatisfiable, parse_range
from app.artifacts.schemas import Artifact
from app.artifacts.service import content_headers, etag
from app.http.errors import Code, Problem
from app.http.etags import matches
from app.http.sendfile import ZERO_COPY
from app.infra.storage import Opened, Storage, StorageError

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Conditions:
    """Which bytes the client wants, and which it has."""

    method: str
    range: str | None
    if_range: str | None
    if_none_match: str | None

    def wants_bytes(self, artifact: Artifact) -> bool:
        return self.method == "GET" and not matches(self.if_none_match, etag(artifact))


async def _conditions(
    request: Request,
    range: Annotated[str | None, Header(description="One byte range; several are answered in full.")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> _Conditions:
    return _Conditions(request.method, range, if_range, if_none_match)


Conditions = Annotated[_Conditions, Depends(_conditions)]


async def elsewhere(storage: Storage, object_key: str, *, seconds: float) -> Response:
    """307 to the object store. The URL is a secret: nobody may keep it or pass it on as a referrer."""
    try:
        url = await storage.sign(object_key, seconds=seconds)
    except StorageError as error:
        raise Problem(Code.UNAVAILABLE, "The object store cannot sign a URL.") from error
    return Response(
        status_code=307,
        headers={"Location": url, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"},
    )


async def content(
    storage: Storage, artifact: Artifact, object_key: str, conditions: _Conditions, *, inline: bool = False
) -> Response:
    """200, 206, 304 or 416, for GET and HEAD; a problem where the store has not the file that was committed."""
    headers = content_headers(artifact, inline=inline)
    if matches(conditions.if_none_match, etag(artifact)):
        return Response(status_code=304, headers=headers)
    wanted = conditions.range
    # HEAD has no ranges, and a part is of use only beside the rest of the same bytes.
    if conditions.method != "GET" or conditions.if_range not in (None, etag(artifact)):
        wanted = None
    try:
        part = parse_range(wanted, artifact.bytes)
    except NotSatisfiable as error:
        raise Problem(
            Code.RANGE_NOT_SATISFIABLE,
            "The file has no byte of this range.",
            headers={"Content-Range": f"bytes */{artifact.bytes}"},
        ) from error
    start, end = part or (0, artifact.bytes)
    # Before any header goes out: an answer that breaks off says nothing.
    try:
        if conditions.method == "HEAD":
            opened, size = None, await storage.size(object_key)
        else:
            opened = await storage.open(object_key, start, end)
            size = None if opened is None else opened.size
    except StorageError as error:
        raise Problem(Code.UNAVAILABLE, "The object store does not answer; try again.") from error
    if size != artifact.bytes:
        if opened is not None:
            opened.close()
        log.error("artifact.damaged", artifact=artifact.id, object_key=object_key)
        raise Problem(
            Code.INTERNAL,
            "The object store lacks this file or holds another; the request id finds it in the log.",
        )
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.bytes}"
    if opened is None:
        return Response(headers=headers, media_type=artifact.media_type)
    return StoredBytes(
        opened,
        start,
        end,
        status_code=200 if part is None else 206,
        headers=headers,
        media_type=artifact.media_type,
    )


class StoredBytes(StreamingResponse):
    """Bytes of an opened object. Those of a local file go to the socket by the kernel, if the server can do that."""

    def __init__(self, opened: Opened, start: int, end: int, **more: Any) -> None:
        super().__init__(opened.chunks, **more)
        self._opened, self._start, self._end = opened, start, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._opened.file is None or ZERO_COPY not in scope.get("extensions", {}):
                await super().__call__(scope, receive, send)
                return
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            if self._start < self._end:
                part = {"offset": self._start, "count": self._end - self._start}
                await send({"type": ZERO_COPY, "file": self._opened.file, **part})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._opened.close()
