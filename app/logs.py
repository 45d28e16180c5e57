"""Logs: one line per event on stderr, readable in a terminal, JSON elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import structlog

from app.auth.keys import redact


def _without_keys(_logger: object, _method: str, line: Any) -> str:
    return redact(line)


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
