"""Logs: one line per event on stderr, readable in a terminal, JSON elsewhere.

Whatever is logged inside a request bears its `request_id`, inside an attempt `job_id`, `step` and `attempt`,
and with traces on `trace_id` and `span_id`. Libraries that log by `logging` come out in the same form.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

from app.infra import tracing
from app.infra.keys import redact


def _without_keys(_logger: object, _method: str, line: Any) -> str:
    return redact(line)


def _with_trace(_logger: object, _method: str, event: EventDict) -> EventDict:
    for name, value in tracing.ids().items():
        event.setdefault(name, value)
    return event


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
    renderer: Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    about: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _with_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*about, renderer, _without_keys],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Enduring(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*about, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer, _without_keys],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
