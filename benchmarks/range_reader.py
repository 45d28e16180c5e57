"""A client that costs little: reads one file over so many connections, a range each, throws the bytes away, prints seconds.

python -m benchmarks.range_reader URL BYTES CONNECTIONS
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from itertools import pairwise
from urllib.parse import urlsplit

BUFFER_BYTES = 1 << 20


def read_range(host: str, port: int, path: str, start: int, end: int) -> None:
    """Read bytes `start` to `end`, exclusive. Raises `SystemExit` when another answer than them comes."""
    with socket.create_connection((host, port), timeout=120) as connection:
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            f"Range: bytes={start}-{end - 1}",
            "Connection: close",
        ]
        if token := os.environ.get("ORTHOKV_TOKEN"):
            lines.append(f"Authorization: Bearer {token}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            received = connection.recv(65536)
            if not received:
                sys.exit("the server closed the connection before its headers ended")
            head += received
        head, _, body = head.partition(b"\r\n\r\n")
        if b" 206 " not in head.split(b"\r\n")[0]:
            sys.exit(f"not the range that was asked for: {head[:200]!r}")
        left = end - start - len(body)
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while left:
            count = connection.recv_into(buffer)
            if not count:
                sys.exit(f"{left} bytes are missing")
            left -= count


def read(url: str, size: int, connections: int) -> float:
    """Seconds until the last byte of the last range."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    bounds = [size * index // connections for index in range(connections + 1)]
    failures: list[BaseException] = []

    def one(start: int, end: int) -> None:
        try:
            read_range(str(parts.hostname), int(parts.port or 0), parts.path, start, end)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=one, args=ends) for ends in pairwise(bounds)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    if failures:
        raise failures[0]
    return elapsed


if __name__ == "__main__":
    sys.stdout.write(f"{read(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}\n")
