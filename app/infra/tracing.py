"""Traces by OpenTelemetry: off, and free, unless the standard `OTEL_*` variables name a collector.

A request is a trace; the job that it creates carries the request's `traceparent`. Each attempt at a step is a
trace of its own that links to it: a job lasts hours and may run many times, so it is not part of the request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.infra.keys import redact

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_propagator = TraceContextTextMapPropagator()


class TracingUnusable(Exception):
    """The environment asks for traces in a way that cannot be had."""


def configure(service: str) -> None:
    """Export spans of this process if the environment says where to. Raises `TracingUnusable`."""
    if not _wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise TracingUnusable("traces (OTEL_*) need pip install 'orthokv[otel]'") from error
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": service}))
    provider.add_span_processor(_redacting())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Requests that are worth no trace."""
    return scope.get("path") in ("/livez", "/readyz")


def traceparent() -> str | None:
    """The W3C header that names the span in which this is called; None outside of any."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent")


def ids() -> dict[str, str]:
    """Ids of the present span, for logs."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


@contextmanager
def new_trace(name: str, *, linked: str | None, attributes: dict[str, Any]) -> Iterator[Span]:
    """A trace that links to the span of a `traceparent`."""
    links: list[Link] = []
    if linked is not None:
        extracted = _propagator.extract({"traceparent": linked}, context=Context())
        origin = trace.get_current_span(extracted).get_span_context()
        links = [Link(origin)] if origin.is_valid else []
    tracer = trace.get_tracer("orthokv")
    with tracer.start_as_current_span(
        name,
        context=Context(),
        kind=SpanKind.CONSUMER,
        links=links,
        attributes=attributes,
        record_exception=False,  # its text may hold what belongs to a client
    ) as current:
        yield current


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """A part of the present trace."""
    tracer = trace.get_tracer("orthokv")
    with tracer.start_as_current_span(name, attributes=attributes, record_exception=False) as current:
        yield current


def past_span(name: str, *, began_ns: int, attributes: dict[str, Any]) -> None:
    """A part of the present trace that ends now and began at this time of the wall clock."""
    trace.get_tracer("orthokv").start_span(name, start_time=began_ns, attributes=attributes).end()


def mark_failed(failed: Span, code: str) -> None:
    failed.set_attribute("error.type", code)
    failed.set_status(StatusCode.ERROR)


def _wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or not (exporter or any(os.environ.get(name) for name in _ENDPOINTS)):
        return False
    if exporter not in ("", "otlp"):
        raise TracingUnusable("OTEL_TRACES_EXPORTER must be otlp or none")
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), "http/protobuf")
    if protocol != "http/protobuf":
        raise TracingUnusable("OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf")
    return True


def _redacting() -> Any:
    """Cuts API keys out of what a client wrote into a URL, as everywhere else."""
    from opentelemetry.sdk.trace import Span as Recorded
    from opentelemetry.sdk.trace import SpanProcessor

    class Redacting(SpanProcessor):
        def on_start(self, span: Recorded, parent_context: Context | None = None) -> None:
            for name in ("url.path", "url.query"):
                value = (span.attributes or {}).get(name)
                if isinstance(value, str) and (cut := redact(value)) != value:
                    span.set_attribute(name, cut)

    return Redacting()
