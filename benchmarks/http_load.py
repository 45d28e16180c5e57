"""A small load generator: requests at a fixed rate, or as fast as they are answered, over kept connections.

At a fixed rate the time of a request counts from the moment at which it was due, not from when a connection was free, so that
a server that stalls is charged for all who would have come meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

Request = Callable[[int], bytes]
"""The bytes of the n-th request."""


@dataclass
class Outcome:
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Times in milliseconds."""
        return {
            "requests": len(self.latencies),
            "per_second": round(len(self.latencies) / self.seconds, 1),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            **milliseconds(self.latencies),
        }


def milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)

    return {"p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0)}


class Connection:
    """One kept HTTP/1.1 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        return cls(*await asyncio.open_connection(host, port))

    async def call(self, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0
        )
        return int(lines[0].split()[1]), await self.reader.readexactly(length)

    def close(self) -> None:
        self.writer.close()


def message(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{k}: {v}" for k, v in headers.items())]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def at_rate(port: int, request: Request, *, rate: float, seconds: float, connections: int) -> Outcome:
    """Send `rate` requests a second, whether or not the ones before are answered."""
    idle: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        idle.put_nowait(await Connection.open("127.0.0.1", port))
    outcome, start = Outcome(), time.perf_counter()

    async def one(number: int) -> None:
        due = start + number / rate
        connection = await idle.get()
        status, _ = await connection.call(request(number))
        outcome.latencies.append(time.perf_counter() - due)
        outcome.statuses[status] += 1
        idle.put_nowait(connection)

    tasks = []
    for number in range(int(rate * seconds)):
        if (left := start + number / rate - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    outcome.seconds = time.perf_counter() - start
    while not idle.empty():
        idle.get_nowait().close()
    return outcome


async def at_most(port: int, request: Request, *, seconds: float, connections: int) -> Outcome:
    """Each connection sends its next request when the one before is answered."""
    outcome, start = Outcome(), time.perf_counter()
    numbers = iter(range(1 << 62))

    async def client() -> None:
        connection = await Connection.open("127.0.0.1", port)
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            status, _ = await connection.call(request(next(numbers)))
            outcome.latencies.append(time.perf_counter() - began)
            outcome.statuses[status] += 1
        connection.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    outcome.seconds = time.perf_counter() - start
    return outcome
