"""Bytes of files from the page cache to the socket, without a copy through this process.

The ASGI extension `http.response.zerocopysend`, which uvicorn lacks. Through Python a download costs a copy and several
calls a chunk; with it, one system call for as much as the socket takes.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.infra.compat import H11Protocol

ZERO_COPY = "http.response.zerocopysend"
# The loop turns to other requests after each part, however fast this client reads.
PART_BYTES = 4 << 20
# A client that takes nothing in this time is gone, or wants to hold the connection.
STALL_SECONDS = 60.0


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
            if scope["type"] != "http" or self.scheme == "https":  # TLS has to see the bytes
                await app(scope, receive, send)
                return
            scope["extensions"] = {**scope.get("extensions", {}), ZERO_COPY: {}}

            async def send_or_copy(message: Message) -> None:
                if message["type"] == ZERO_COPY:
                    await self._copy(message["file"].fileno(), message["offset"], message["count"])
                else:
                    await send(message)

            await app(scope, receive, send_or_copy)

        return offering

    async def _copy(self, file: int, offset: int, count: int) -> None:
        """Send `count` bytes of a file. The headers are out; what cannot be sent breaks the connection."""
        cycle = self.cycle  # one request is answered at a time
        if self.transport.is_closing():
            return
        self.transport.set_write_buffer_limits(high=0)  # so that the headers are with the kernel, all of them
        await self.flow.drain()
        try:
            if not cycle.disconnected:
                self.conn.send_with_data_passthrough(h11.Data(data=_Length(count)))  # type: ignore[arg-type]
                await _Copy(self, file, offset, count).run()
        except (OSError, EOFError):
            cycle.disconnected = True
            self.transport.abort()
        finally:
            if not self.transport.is_closing():
                self.transport.set_write_buffer_limits()


class _Copy:
    """One file's way into one connection."""

    def __init__(self, protocol: ZeroCopyProtocol, file: int, offset: int, count: int) -> None:
        self._cycle = protocol.cycle
        self._file, self._offset, self._end = file, offset, offset + count
        self._done: asyncio.Future[None] = protocol.loop.create_future()
        self._loop = protocol.loop
        # The loop lets nobody else wait for a transport's own descriptor.
        self._socket = os.dup(protocol.transport.get_extra_info("socket").fileno())

    async def run(self) -> None:
        """Raises `OSError` when the client is gone or takes nothing, `EOFError` when the file was cut."""
        self._loop.add_writer(self._socket, self._send_part)
        try:
            while not self._done.done():
                before = self._offset
                await asyncio.wait([self._done], timeout=STALL_SECONDS)
                if self._offset == before and not self._done.done():
                    raise TimeoutError
            self._done.result()
        finally:
            self._loop.remove_writer(self._socket)
            os.close(self._socket)

    def _send_part(self) -> None:
        if self._done.done():
            return
        try:
            if self._cycle.disconnected:
                raise ConnectionResetError
            sent = os.sendfile(
                self._socket, self._file, self._offset, min(PART_BYTES, self._end - self._offset)
            )
            if sent == 0:
                raise EOFError
        except BlockingIOError:
            return
        except (OSError, EOFError) as error:
            self._done.set_exception(error)
            return
        self._offset += sent
        if self._offset == self._end:
            self._done.set_result(None)
