"""A connection that breaks where a test wants it to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Cutting:
    """A proxy that closes each connection after so many bytes of answers: a number for each connection, in order.

    Without a number left it cuts no more. What a client had sent has reached the server then.
    """

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._server = (parts.hostname, parts.port)
        self._cuts: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open = 0
        self.most_open = 0
        self.accepted = 0
        self.passed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self, *after: int) -> None:
        """Cut the next connections after so many bytes each."""
        with self._lock:
            self._cuts = list(after)
            self.accepted = self.passed = self.most_open = 0

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                left = self._cuts.pop(0) if self._cuts else None
            threading.Thread(target=self._serve, args=(client, left), daemon=True).start()

    def _serve(self, client: socket.socket, left: int | None) -> None:
        with self._lock:
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        with client, socket.create_connection(self._server) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            with contextlib.suppress(OSError):
                while chunk := server.recv(65536):
                    if left is not None:
                        chunk, left = chunk[:left], left - len(chunk)
                    client.sendall(chunk)
                    self.passed += len(chunk)
                    if left is not None and left <= 0:
                        break
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open -= 1

    def __enter__(self) -> Cutting:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk)


@contextlib.contextmanager
def cutting(server: str) -> Iterator[Cutting]:
    with Cutting(server) as proxy:
        yield proxy
