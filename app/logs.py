"""Logs: one line per event on stderr, readable in a terminal, JSON elsewhere."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast

import structlog

from app.auth.keys import redact


def _without_keys(_logger: object, _method: str, line: Any) -> str:
    return redact(line)


class _Enduring:
    """A stream that loses what it cannot write: a full disk under the log must not end a worker or fail a request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure() -> None:
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
            _without_keys,
        ],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Enduring(sys.stderr))),
        cache_logger_on_first_use=True,
    )
