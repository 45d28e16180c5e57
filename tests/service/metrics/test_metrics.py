"""What is counted, and what the database is asked."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from prometheus_client import Metric
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from app.hints.pipe import LocalDispatcher
from app.infra.counted import REGISTRY
from app.infra.database import SyncDatabase, after_commit, now
from app.infra.ids import new_id
from app.infra.storage import Storage
from app.jobs.lease import Failure, fail
from app.jobs.vocabulary import JobErrorCode
from app.main import create_app
from app.metrics import stored
from app.metrics.port import api_metrics, worker_metrics
from app.metrics.stored import StoredMetrics
from app.principal import DEFAULT_PROJECT_ID
from app.reaper import Reaper
from app.settings import Settings
from app.webhooks import attempts
from app.webhooks.models import WebhookDelivery, WebhookEndpoint
from tests.service.cli.test_fleet_cli import orthokv
from tests.service.workers.test_supervisor import run_to_end, running, until
from tests.support.factories import (
    POLICY,
    Script,
    complete,
    expire,
    finish,
    must_claim,
    queue_job,
    read_job,
)
from tests.support.scrape import counted, scrape, values
from tests.support.tenants import OWNER, bearer, new_key


@pytest.fixture
def collector(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredMetrics]:
    """Asks anew each time."""
    monkeypatch.setattr(stored, "CACHE_SECONDS", 0.0)
    collector = StoredMetrics(settings.resolved_database_url, ("default", "h100"))
    yield collector
    collector.close()


def asked(collector: StoredMetrics) -> list[Metric]:
    return list(collector.collect())


def let_wait(database: SyncDatabase, seconds: float) -> None:
    """All ready steps have waited for this long."""
    moment = {
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', :s))",
        "postgresql": "clock_timestamp() + :s * interval '1 second'",
    }[database.engine.dialect.name]
    statement = text(f"UPDATE step SET not_before = {moment} WHERE status = 'ready'")
    database.write(lambda session: session.execute(statement, {"s": -seconds}))


class TestStored:
    def test_the_queue_is_told_by_class_even_where_it_is_empty(
        self, database: SyncDatabase, collector: StoredMetrics
    ) -> None:
        assert values(asked(collector), "orthokv_queue_depth") == {("default",): 0, ("h100",): 0}
        for _ in range(3):
            queue_job(database)
        let_wait(database, 90)
        must_claim(database)
        queue_job(database, gpu_class="h100")
        found = asked(collector)
        assert values(found, "orthokv_queue_depth") == {("default",): 2, ("h100",): 1}
        assert values(found, "orthokv_steps_running") == {("default",): 1, ("h100",): 0}
        ages = values(found, "orthokv_queue_oldest_seconds")
        assert 90 <= ages[("default",)] < 150
        assert 0 <= ages[("h100",)] < 60

    def test_a_step_that_may_not_run_yet_does_not_wait(
        self, database: SyncDatabase, collector: StoredMetrics
    ) -> None:
        queue_job(database)
        let_wait(database, -60)
        assert values(asked(collector), "orthokv_queue_depth")[("default",)] == 0
        assert values(asked(collector), "orthokv_queue_oldest_seconds")[("default",)] == 0

    def test_a_step_waits_from_when_it_could_run(
        self, database: SyncDatabase, collector: StoredMetrics
    ) -> None:
        """Not from when its job was made, which may be hours before."""
        job = queue_job(database)
        database.write(
            lambda session: session.execute(text("UPDATE step SET not_before = '2020-01-01 00:00:00.000'"))
        )
        finish(database, must_claim(database))
        assert read_job(database, job.id).phase == "resolving"
        ages = values(asked(collector), "orthokv_queue_oldest_seconds")
        assert 0 <= ages[("default",)] < 60

    def test_jobs_are_told_by_status_and_code(self, database: SyncDatabase, collector: StoredMetrics) -> None:
        complete(database, queue_job(database).id)
        queue_job(database)
        lease = must_claim(database)
        database.write(fail, lease, Failure(JobErrorCode.MODEL_GATED, "gated", retryable=False), POLICY)
        queue_job(database)
        assert values(asked(collector), "orthokv_jobs_stored") == {
            ("", "succeeded"): 1,
            ("model_gated", "failed"): 1,
            ("", "queued"): 1,
        }

    def test_webhooks_that_are_due_are_told_until_they_are_under_way(
        self, database: SyncDatabase, collector: StoredMetrics
    ) -> None:
        def due() -> tuple[float, float]:
            found = asked(collector)
            names = ("orthokv_webhooks_due", "orthokv_webhooks_oldest_seconds")
            return values(found, names[0])[()], values(found, names[1])[()]

        assert due() == (0, 0)
        endpoint = WebhookEndpoint(
            id=new_id("whe"),
            project_id=DEFAULT_PROJECT_ID,
            url="https://receiver.example/",
            description="",
            cloud_events=False,
            secret="sealed",
        )
        database.write(lambda session: session.add(endpoint))
        for _ in range(2):
            queue_job(database)
        late = update(WebhookDelivery).values(next_attempt_at=now(-90.0))
        database.write(lambda session: session.execute(late))
        assert due()[0] == 2
        assert 90 <= due()[1] < 150
        attempt = database.write(attempts.claim, lease_seconds=60.0)
        assert attempt is not None
        assert due()[0] == 1
        before = counted("orthokv_webhook_attempts_total", outcome="failed")
        database.write(attempts.record, attempt, attempts.Outcome("no answer"), schedule=(5.0,))
        assert due()[0] == 1  # the next attempt has its time
        assert counted("orthokv_webhook_attempts_total", outcome="failed") == before + 1

    def test_an_overdue_lease_shows_until_it_is_ended(
        self, database: SyncDatabase, collector: StoredMetrics
    ) -> None:
        queue_job(database)
        lease = must_claim(database)
        assert values(asked(collector), "orthokv_leases_overdue") == {(): 0}
        expire(database, lease)
        assert values(asked(collector), "orthokv_leases_overdue") == {(): 1}

    def test_processes_agree(self, database: SyncDatabase, settings: Settings) -> None:
        shared = settings.model_copy(update={"metrics_port": 0})
        queue_job(database)
        with api_metrics(shared) as one, api_metrics(shared) as other:
            assert one is not None
            assert other is not None
            names = ("orthokv_jobs_stored", "orthokv_queue_depth", "orthokv_steps_running")
            first, second = ([values(scrape(each), name) for name in names] for each in (one, other))
        assert first == second
        assert first[0] == {("", "queued"): 1}

    def test_many_scrapes_ask_the_database_once(self, database: SyncDatabase, settings: Settings) -> None:
        collector = StoredMetrics(settings.resolved_database_url, ())
        before = asked(collector)
        queue_job(database)
        assert asked(collector) == before
        collector.close()

    def test_a_database_that_is_away_is_said_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stored, "CACHE_SECONDS", 0.0)
        collector = StoredMetrics("postgresql://nobody@127.0.0.1:9/nothing", ("default",))
        found = asked(collector)
        assert values(found, "orthokv_database_up") == {(): 0}
        assert {metric.name for metric in found} == {"orthokv_database_up", "orthokv_database_scrape_seconds"}
        collector.close()


class TestCounted:
    def test_what_is_rolled_back_is_not_counted(self, database: SyncDatabase) -> None:
        told: list[int] = []

        def change(session: Session, fails: bool) -> None:
            after_commit(session, lambda: told.append(1))
            if fails:
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            database.write(change, True)
        assert told == []
        database.write(change, False)
        assert told == [1]

    def test_jobs_are_counted_as_they_end(self, database: SyncDatabase, client: TestClient) -> None:
        def ended() -> list[float]:
            name = "orthokv_jobs_total"
            return [
                counted(name, status="succeeded", code=""),
                counted(name, status="cancelled", code=""),
                counted(name, status="failed", code="out_of_memory"),
            ]

        before = ended()
        complete(database, queue_job(database).id)
        assert client.post(f"/v1/jobs/{queue_job(database).id}/cancel").status_code == 200
        queue_job(database)
        failure = Failure(JobErrorCode.OUT_OF_MEMORY, "too large", retryable=False)
        database.write(fail, must_claim(database), failure, POLICY)
        assert [after - was for after, was in zip(ended(), before, strict=True)] == [1, 1, 1]

    def test_the_reaper_counts_what_it_rescues(
        self, database: SyncDatabase, settings: Settings, storage: Storage
    ) -> None:
        def found() -> tuple[float, float]:
            rescued = counted("orthokv_reaper_rescued_total", what="attempts_lost")
            return rescued, counted("orthokv_lease_expiries_total")

        reaper = Reaper(database, storage, LocalDispatcher(settings.wake_file), settings)
        queue_job(database)
        expire(database, must_claim(database))
        before = found()
        for _ in range(2):
            reaper.sweep()
        assert found() == (before[0] + 1, before[1] + 1)

    def test_the_reaper_counts_its_rounds(
        self, settings: Settings, database: SyncDatabase, storage: Storage
    ) -> None:
        def rounds() -> tuple[float, float]:
            name = "orthokv_reaper_sweeps_total"
            return counted(name, outcome="done"), counted(name, outcome="failed")

        before = rounds()
        reaper = Reaper(database, storage, LocalDispatcher(settings.wake_file), settings)
        reaper.start()
        until(lambda: rounds()[0] > before[0], "a round is done")
        reaper.stop()
        away = SyncDatabase("sqlite:////nowhere/nothing.db")
        reaper = Reaper(away, storage, LocalDispatcher(settings.wake_file), settings)
        reaper.start()
        until(lambda: rounds()[1] > before[1], "a round fails")
        reaper.stop()

    def test_a_worker_counts_its_attempts_layers_and_memory(
        self, database: SyncDatabase, settings: Settings, script: Script
    ) -> None:
        def found() -> list[float]:
            return [
                counted("orthokv_attempts_total", step="fit", outcome="succeeded", code=""),
                counted("orthokv_attempts_total", step="fit", outcome="failed", code="worker_lost"),
                counted("orthokv_attempt_seconds_count", step="fit"),
                counted("orthokv_layer_seconds_count"),
            ]

        before = found()
        script.write({"step": "fit", "run": 0, "do": "die", "layer": 1})
        run_to_end(database, settings, queue_job(database).id)
        assert [after - was for after, was in zip(found(), before, strict=True)] == [1, 1, 2, 3]
        peak = counted("orthokv_peak_memory_bytes", step="fit", memory="host")
        assert 1 << 20 < peak < 1 << 32

    def test_a_worker_shows_whether_it_is_idle(
        self, database: SyncDatabase, settings: Settings, script: Script
    ) -> None:
        def idle() -> float:
            return counted("orthokv_worker_idle", gpu_class="default")

        script.write({"step": "resolve", "run": 0, "do": "hang_until_released"})
        with running(settings):
            until(lambda: idle() == 1, "it waits for work")
            queue_job(database)
            until(lambda: script.is_hanging("resolve"), "it works")
            assert idle() == 0
            script.go_on()
            until(lambda: idle() == 1, "it waits again")
        assert idle() == 0


class TestRequests:
    def test_requests_are_told_by_template_never_by_path(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        def found(method: str, route: str, status: int) -> float:
            name = "orthokv_http_request_seconds_count"
            return counted(name, method=method, route=route, status=str(status))

        job = queue_job(database).id
        template = "/v1/jobs/{job_id}"
        asked_for = [
            ("GET", template, 200, f"/v1/jobs/{job}"),
            ("GET", f"{template}?wait", 200, f"/v1/jobs/{job}?wait=0"),
            ("GET", template, 404, f"/v1/jobs/job_{'0' * 26}"),
            ("GET", template, 422, "/v1/jobs/secret-of-a-client"),
            ("GET", "none", 404, "/v1/secret-of-a-client"),
            ("OTHER", "none", 404, "/v1/secret-of-a-client"),
            ("GET", "/livez", 200, "/livez"),
        ]
        for method, route, status, path in asked_for:
            before = found(method, route, status)
            sent = "BREW" if method == "OTHER" else method
            assert client.request(sent, path).status_code == status
            assert found(method, route, status) == before + 1, path
        labels = {value for one in REGISTRY.collect() for s in one.samples for value in s.labels.values()}
        assert not [value for value in labels if "secret-of" in value or "job_0" in value or job in value]

    def test_a_refused_host_is_counted_too(self, client: TestClient) -> None:
        before = counted("orthokv_problems_total", code="invalid_host")
        client.get("/livez", headers={"Host": "elsewhere"})
        assert counted("orthokv_problems_total", code="invalid_host") == before + 1

    def test_rate_limited_requests_are_counted(self, settings: Settings, database: SyncDatabase) -> None:
        few = settings.model_copy(update={"rate_limit_requests": 1})
        key = bearer(new_key(database, DEFAULT_PROJECT_ID))
        before = counted("orthokv_problems_total", code="rate_limited")
        with TestClient(create_app(few), headers=OWNER) as client:
            statuses = [client.get("/v1/jobs", headers=key).status_code for _ in range(3)]
        assert statuses == [200, 429, 429]
        assert counted("orthokv_problems_total", code="rate_limited") == before + 2

    def test_open_event_streams_are_counted(
        self, client: TestClient, database: SyncDatabase, settings: Settings
    ) -> None:
        job = queue_job(database).id
        seen: list[float] = []

        def end_it() -> None:
            until(lambda: counted("orthokv_event_streams") == 1, "the stream is open")
            seen.append(counted("orthokv_event_streams"))
            client.post(f"/v1/jobs/{job}/cancel")

        thread = threading.Thread(target=end_it)
        thread.start()
        client.get(f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})
        thread.join()
        assert seen == [1]
        assert counted("orthokv_event_streams") == 0


class TestPort:
    def test_there_is_none_unless_one_is_set(self, settings: Settings, client: TestClient) -> None:
        assert (Settings().metrics_port, Settings().worker_metrics_port) == (None, None)
        assert Settings().metrics_host == "127.0.0.1"
        with api_metrics(settings) as one, worker_metrics(settings) as other:
            assert (one, other) == (None, None)
        assert client.get("/metrics").status_code == 404

    @pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "[::1", ""])
    def test_on_the_loopback_it_answers_to_no_other_name(self, settings: Settings, name: str) -> None:
        with worker_metrics(settings.model_copy(update={"worker_metrics_port": 0})) as port:
            url = f"http://127.0.0.1:{port}/metrics"
            assert httpx2.get(url, headers={"Host": name}).status_code == 403
            assert httpx2.get(url, headers={"Host": "localhost"}).status_code == 200

    def test_elsewhere_it_answers_to_every_name(self, settings: Settings) -> None:
        changes = {"worker_metrics_port": 0, "metrics_host": "0.0.0.0"}
        with worker_metrics(settings.model_copy(update=changes)) as port:
            url = f"http://127.0.0.1:{port}/metrics"
            assert httpx2.get(url, headers={"Host": "10.1.2.3:9464"}).status_code == 200

    @pytest.mark.parametrize(
        ("command", "setting"), [("api", "METRICS_PORT"), ("worker", "WORKER_METRICS_PORT")]
    )
    def test_a_port_that_is_taken_is_one_line(self, tmp_path: Path, command: str, setting: str) -> None:
        url = f"sqlite:///{tmp_path / 'fleet.db'}"
        assert orthokv("migrate", DATABASE_URL=url).returncode == 0
        arguments = ("--port", "0") if command == "api" else ()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            told = {setting: str(taken.getsockname()[1]), "DATABASE_URL": url, "DATA_DIR": str(tmp_path)}
            done: subprocess.CompletedProcess[str] = orthokv(command, *arguments, **told)
        assert (done.returncode, done.stderr) == (2, "orthokv: cannot start: Address already in use\n")
