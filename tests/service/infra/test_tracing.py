"""From a request to its layers: traces that link to each other, in one process and across real ones."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, StatusCode

from app.infra import tracing
from app.infra.database import SyncDatabase
from app.infra.ids import new_id
from app.infra.keys import generate
from app.jobs.repository import get_job
from app.jobs.vocabulary import JobStatus
from app.settings import Settings
from tests.service.conftest import copy_of
from tests.service.workers.test_supervisor import run_to_end
from tests.support.factories import Script, job_body
from tests.support.fleet import Api, Worker
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.scrape import json_lines


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(tracing._redacting())
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The API lets a process set its provider once; a test sets it for itself.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def only(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = named(exporter, name)
    return span


def context_of(span: ReadableSpan) -> SpanContext:
    assert span.context is not None
    return span.context


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def test_request_job_attempt_step_and_layers_are_linked(
    exported: InMemorySpanExporter,
    client: TestClient,
    database: SyncDatabase,
    settings: Settings,
) -> None:
    job_id = client.post("/v1/jobs", json=job_body()).json()["id"]
    run_to_end(database, settings, job_id)
    request = only(exported, "POST /v1/jobs")
    row = database.read(get_job, job_id)
    assert row is not None
    origin = context_of(request)
    assert row.traceparent is not None
    assert row.traceparent[:-3] == f"00-{origin.trace_id:032x}-{origin.span_id:016x}"
    traces = set()
    for step in ("resolve", "calibrate", "fit", "profile", "package", "evaluate"):
        attempt = only(exported, f"attempt {step}")
        # A trace of its own, hours after a request that was answered at once; the link leads back.
        assert attempt.parent is None
        (link,) = attempt.links
        assert (link.context.trace_id, link.context.span_id) == (origin.trace_id, origin.span_id)
        traces.add(context_of(attempt).trace_id)
        assert parent_of(only(exported, f"step {step}")) == context_of(attempt).span_id
        assert attempt.attributes is not None
        assert attempt.attributes["orthokv.job_id"] == job_id
        assert attempt.attributes["orthokv.attempt"] == 1
        assert attempt.attributes["orthokv.outcome"] == "succeeded"
    assert len(traces | {origin.trace_id}) == 7
    fit = only(exported, "step fit")
    for layer in range(3):
        span = only(exported, f"layer {layer}")
        assert parent_of(span) == context_of(fit).span_id
        assert span.attributes is not None
        assert span.attributes["orthokv.error"] == 0.1
        assert fit.start_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert fit.start_time <= span.start_time + 1_000_000 <= span.end_time + 1_000_000


def test_a_failed_attempt_says_so_and_the_next_links_to_the_same_request(
    exported: InMemorySpanExporter,
    client: TestClient,
    database: SyncDatabase,
    settings: Settings,
    script: Script,
) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "transient"})
    job_id = client.post("/v1/jobs", json=job_body()).json()["id"]
    run_to_end(database, settings, job_id)
    first, second = named(exported, "attempt calibrate")
    assert first.status.status_code is StatusCode.ERROR
    assert first.attributes is not None
    assert first.attributes["error.type"] == "storage_error"
    assert second.status.status_code is not StatusCode.ERROR
    assert context_of(first).trace_id != context_of(second).trace_id
    assert [link.context for link in first.links] == [link.context for link in second.links]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_clients_own_trace_goes_on_and_no_key_gets_into_it(
    exported: InMemorySpanExporter, client: TestClient
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    key = generate(new_id("key"))
    client.get(f"/v1/jobs?model={key}", headers={"traceparent": parent})
    client.get("/livez")
    (span,) = exported.get_finished_spans()
    assert context_of(span).trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    said = span.to_json()
    assert "[redacted]" in said
    assert key not in said


def test_without_an_exporter_nothing_is_traced_or_stored(
    client: TestClient, database: SyncDatabase, settings: Settings
) -> None:
    job_id = client.post("/v1/jobs", json=job_body()).json()["id"]
    row = database.read(get_job, job_id)
    assert row is not None
    assert row.traceparent is None
    assert tracing.ids() == {}
    assert run_to_end(database, settings, job_id).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("linked", [None, "", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_trace_without_an_origin_has_no_link(exported: InMemorySpanExporter, linked: str | None) -> None:
    with tracing.new_trace("alone", linked=linked, attributes={}):
        pass
    assert not only(exported, "alone").links


class Collector:
    """A stand-in of an OpenTelemetry collector: takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                message = ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    service = {one.key: one.value.string_value for one in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        spans.extend((service["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: a test's output is its own."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def span(self, service: str, name: str) -> Any:
        (found,) = [span for by, span in self.spans if (by, span.name) == (service, name)]
        return found


@pytest.fixture
def otlp() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_real_processes_export_linked_traces_and_log_their_ids(
    otlp: Collector, sqlite_template: Path, script: Script, tmp_path: Path
) -> None:
    script.write({"step": "fit", "run": 0, "do": "chatter"})
    environment = {
        "ORTHOKV_DATABASE_URL": copy_of(sqlite_template, tmp_path),
        "ORTHOKV_STORAGE_URL": (tmp_path / "objects").as_uri(),
        "ORTHOKV_AUTH_REQUIRED": "false",
        "ORTHOKV_IDLE_POLL_SECONDS": "0.05",
        "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
        "ORTHOKV_DATA_DIR": str(tmp_path / "api"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with Worker(tmp_path / "worker", environment) as worker:
        with Api(tmp_path / "api", environment) as api:
            job_id = api.post("/v1/jobs", job_body())["id"]
            api.wait_for_end(job_id)
        assert worker.stop() == 0
    request = otlp.span("orthokv-api", "POST /v1/jobs")
    attempt = otlp.span("orthokv-worker", "attempt fit")
    (link,) = attempt.links
    assert (link.trace_id, link.span_id) == (request.trace_id, request.span_id)
    assert otlp.span("orthokv-worker", "layer 2").trace_id == attempt.trace_id

    posted = next(line for line in json_lines(api.log_file) if line["event"] == "job.created")
    assert posted["job_id"] == job_id
    assert posted["trace_id"] == request.trace_id.hex()
    answered = next(
        line
        for line in json_lines(api.log_file)
        if line["event"] == "request.answered" and line["method"] == "POST"
    )
    assert (answered["request_id"], answered["trace_id"]) == (posted["request_id"], posted["trace_id"])
    lines = json_lines(worker.log_file)
    committed = [line for line in lines if line["event"] == "layer.committed"]
    said = next(line for line in lines if line["event"] == "child.said")
    assert said["line"] == "Loading weights"
    for line in (*committed, said):
        assert (line["job_id"], line["attempt"], line["step"]) == (job_id, 1, "fit")
        assert line["trace_id"] == attempt.trace_id.hex()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER must be otlp or none"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "must be http/protobuf",
        ),
    ],
)
def test_traces_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tracing.TracingUnusable, match=message):
        tracing.configure("test")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = trace.get_tracer_provider()
    tracing.configure("test")
    assert trace.get_tracer_provider() is before


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(tracing.TracingUnusable, match=r"pip install 'orthokv\[otel\]'"):
        tracing.configure("test")
