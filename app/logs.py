"""Logs: one line per event on stderr, readable in a terminal, JSON elsewhere.

Whatever is logged inside a request bears its `request_id`, inside an attempt `job_id`, `step` and `attempt`,
and with traces on `trace_id` and `span_id`. Libraries that log by `logging` come out in the same form.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from app import tracing
from app.auth.keys import redact


def _without_keys(_logger: object, _method: str, line: Any) -> str:
    return redact(line)


def _with_trace(_logger: object, _method: str, event: EventDict) -> EventDict:
    for name, value in tracing.ids().items():
        event.setdefault(name, value)
    return event


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
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
