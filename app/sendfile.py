"""Bytes of files from the page cache to the socket, without a copy through this process.

The ASGI extension `http.response.zerocopysend`, which uvicorn lacks. Through Python a download costs a copy and several
calls a chunk; with it, one system call for as much as the socket takes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

ZERO_COPY = "http.response.zerocopysend"
# The loop turns to other requests after each part, however fast this client reads.
PART_BYTES = 4 << 20
# A client that takes less than a part in this time is gone, or wants to hold the connection.
STALL_SECONDS = 300.0


class _Length:
    """Stands for bytes that h11 counts and never sees; its documented way to use sendfile."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


class ZeroCopyProtocol(H11Protocol):
    """uvicorn's protocol, and the extension."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app: Any = self._offering(self.app)

    def _offering(self, app: Any) -> ASGIApp:
        async def offering(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            scope["extensions"] = {**scope.get("extensions", {}), ZERO_COPY: {}}

            async def send_or_copy(message: Message) -> None:
                if message["type"] == ZERO_COPY:
                    await self._copy(message["file"], message["offset"], message["count"])
                else:
                    await send(message)

            await app(scope, receive, send_or_copy)

        return offering

    async def _copy(self, file: Any, offset: int, count: int) -> None:
        """Send `count` bytes of a file. The headers are out; what cannot be sent breaks the connection."""
        cycle = self.cycle  # one request is answered at a time
        await self.flow.drain()
        if cycle.disconnected:
            return
        self.conn.send_with_data_passthrough(h11.Data(data=_Length(count)))  # type: ignore[arg-type]
        end = offset + count
        try:
            while offset < end:
                if self.transport.is_closing():
                    raise ConnectionResetError
                part = min(end - offset, PART_BYTES)
                async with asyncio.timeout(STALL_SECONDS):
                    sent = await self.loop.sendfile(self.transport, file, offset, part)
                if sent < part:
                    raise EOFError  # the file was cut while it was sent
                offset += sent
                await asyncio.sleep(0)
        except (OSError, EOFError):
            cycle.disconnected = True
            self.transport.abort()
