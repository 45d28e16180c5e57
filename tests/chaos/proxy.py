"""Stands between a client and a server of HTTP, and can be slow, or answer 503 to everything."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "slow", "refuse"]
SLOW_SECONDS = 0.3
_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Forwards connections to one server, byte by byte."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._mode: Mode = "pass"
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, mode: Mode) -> None:
        """From now on; connections in use are cut, as by a server that goes away."""
        self._mode = mode
        if mode == "refuse":
            for one in list(self._open):
                _close(one)

    def close(self) -> None:
        _close(self._listening)
        self.set("refuse")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._mode == "refuse":
            with contextlib.suppress(OSError):
                client.settimeout(1)
                client.recv(65536)
                client.sendall(_REFUSAL)
            _close(client)
            return
        try:
            server = socket.create_connection(self._target)
        except OSError:
            _close(client)
            return
        self._open |= {client, server}
        threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
        self._copy(server, client)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self._mode == "slow":
                    time.sleep(SLOW_SECONDS)
                sink.sendall(data)
        for one in (source, sink):
            _close(one)
            self._open.discard(one)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
