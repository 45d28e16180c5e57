"""The Python client against the real API over a real socket; every claim holds for the synchronous and the asynchronous one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import text
from starlette.types import Receive, Scope, Send

from app.infra.database import SyncDatabase
from app.settings import Settings
from orthokv_client import (
    Conflict,
    InvalidRequest,
    NotFound,
    OrthoKV,
    Retry,
    ServerError,
    TooManyRequests,
    Unauthenticated,
    UnexpectedAnswer,
    Unreachable,
    models,
)
from tests.support.cutting import Cutting, cutting
from tests.support.driven import Clients
from tests.support.factories import complete, job_body, queue_job
from tests.support.orthokv_server import until
from tests.support.paths import REPOSITORY
from tests.support.serving import listening, serving

NOBODY = "0" * 26


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture
def client(make: Clients, url: str) -> Any:
    return make(url)


@pytest.fixture
def proxy(url: str) -> Iterator[Cutting]:
    with cutting(url) as proxy:
        yield proxy


def count(database: SyncDatabase, table: str) -> int:
    return int(
        database.read(lambda session: session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())
    )


def later(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=lambda: (time.sleep(0.2), act()))
    thread.start()
    return thread


class TestJobs:
    def test_from_a_file_to_a_finished_job(self, client: Any, database: SyncDatabase, tmp_path: Path) -> None:
        file = tmp_path / "calibration.jsonl"
        file.write_text('{"text": "one"}\n' * 1000)
        dataset = client.datasets.upload(file)
        assert (dataset.status, dataset.bytes, dataset.upload) == ("ready", file.stat().st_size, None)
        assert client.datasets.get(dataset.id) == dataset
        body = models.JobCreate.model_validate(job_body(dataset={"id": dataset.id, "num_samples": 4}))
        job = client.jobs.create(body)
        assert (job.status, job.spec.dataset.id, job.spec.budget.value) == ("queued", dataset.id, 0.25)
        worker = later(lambda: complete(database, job.id))
        done = client.jobs.wait(job.id)
        worker.join()
        assert (done.status, done.result.measured["perplexity"]) == ("succeeded", 9.0)
        assert client.profiles.get(done.result.profile_id).files.json_.filename == "profile.json"
        assert client.checkpoints.files(done.result.checkpoint_id).bytes == 12
        assert [layer.layer for layer in client.jobs.layers(job.id).data] == [0, 1, 2]

    def test_a_list_goes_over_its_pages_and_names_each_once(
        self, client: Any, database: SyncDatabase
    ) -> None:
        ids = [queue_job(database, metadata={"team": "a" if n % 2 else "b"}).id for n in range(7)]
        assert [job.id for job in client.jobs.list(page_size=2)] == ids[::-1]
        assert [job.id for job in client.jobs.list(order="asc", page_size=3)] == ids
        assert [job.id for job in client.jobs.list(metadata={"team": "a"}, page_size=1)] == ids[::-1][1::2]
        assert list(client.jobs.list(status="failed")) == []

    def test_cancel_and_retry(self, client: Any, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        assert client.jobs.cancel(job_id).status == "cancelled"
        assert client.jobs.retry(job_id).status == "queued"

    def test_follow_gives_every_state_once_until_the_end(self, client: Any, database: SyncDatabase) -> None:
        job_id = queue_job(database).id
        worker = later(lambda: complete(database, job_id))
        states = list(client.jobs.follow(job_id))
        worker.join()
        versions = [job.version for job in states]
        assert versions == sorted(set(versions))
        assert (states[0].status, states[-1].status) == ("queued", "succeeded")

    def test_waiting_has_an_end(self, client: Any, database: SyncDatabase) -> None:
        with pytest.raises(TimeoutError, match="is still queued"):
            client.jobs.wait(queue_job(database).id, timeout_seconds=0.1)

    def test_another_budget(self, client: Any, database: SyncDatabase) -> None:
        first = complete(database, queue_job(database).id)
        assert first.result is not None
        job = client.profiles.create_checkpoint(
            first.result.profile_id, {"budget": {"metric": "kept", "value": 0.5}}
        )
        assert (job.kind, job.spec.profile_id) == ("checkpoint", first.result.profile_id)
        assert [profile.id for profile in client.profiles.list()] == [first.result.profile_id]
        assert [found.id for found in client.checkpoints.list(profile_id=first.result.profile_id)] == [
            first.result.checkpoint_id
        ]


class TestEvents:
    def test_none_is_left_out_and_none_comes_twice(
        self, make: Clients, settings: Settings, database: SyncDatabase
    ) -> None:
        """Streams that end after a moment, so that one watch needs many of them."""
        with serving(settings.model_copy(update={"max_stream_seconds": 0.05})) as url:
            client = make(url)
            job_id = queue_job(database).id
            worker = later(lambda: complete(database, job_id))
            seen = list(client.jobs.watch(job_id))
            worker.join()
            assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
            page = client.jobs.events(job_id, limit=1000)
            assert page.data == seen
            assert [event.seq for event in client.jobs.watch(job_id, after=5)] == [
                event.seq for event in seen[5:]
            ]

    @pytest.mark.parametrize("cuts", [(0, 1, 150), (700, 900, 1100, 1300), (2000,)])
    def test_a_stream_that_is_cut_anywhere_goes_on(
        self, make: Clients, proxy: Cutting, database: SyncDatabase, cuts: tuple[int, ...]
    ) -> None:
        job = complete(database, queue_job(database).id)
        proxy.cut(*cuts)
        seen = [event.seq for event in make(proxy.url, retry=FAST).jobs.watch(job.id)]
        assert seen == list(range(1, len(seen) + 1))
        assert proxy.accepted > len(cuts)
        assert len(seen) > 10


FAST = Retry(attempts=8, first_seconds=0.01)


class TestRepetition:
    def test_a_creation_whose_answer_is_lost_happens_once(
        self, make: Clients, proxy: Cutting, database: SyncDatabase
    ) -> None:
        proxy.cut(0, 30)
        job = make(proxy.url, retry=FAST).jobs.create(job_body())
        assert proxy.accepted == 3
        assert count(database, "job") == 1
        assert job.status == "queued"

    def test_two_creations_are_two(self, client: Any, database: SyncDatabase) -> None:
        assert client.jobs.create(job_body()).id != client.jobs.create(job_body()).id
        same = [client.jobs.create(job_body(), idempotency_key="mine").id for _ in range(2)]
        assert same[0] == same[1]
        assert count(database, "job") == 3

    def test_what_would_happen_twice_is_not_repeated(
        self, make: Clients, proxy: Cutting, database: SyncDatabase
    ) -> None:
        proxy.cut(0)
        with pytest.raises(Unreachable):
            make(proxy.url, retry=FAST).api_keys.create({"name": "n", "scopes": ["jobs:read"]})
        until(lambda: count(database, "api_key") == 1, "the lost request's key is there")
        assert proxy.accepted == 1

    def test_an_upload_begins_again_from_its_first_byte(
        self, make: Clients, proxy: Cutting, tmp_path: Path
    ) -> None:
        file = tmp_path / "calibration.txt"
        file.write_bytes(b"text " * 500_000)
        client = make(proxy.url, retry=FAST)
        next(iter(client.jobs.list()), None)  # a connection that is open already, and then others that break
        proxy.cut(0, 10)
        client.close()
        client = make(proxy.url, retry=FAST)
        assert client.datasets.upload(file).bytes == 2_500_000

    def test_a_server_that_is_away_for_a_moment(self, make: Clients, proxy: Cutting) -> None:
        proxy.cut(*[0] * 4)
        assert list(make(proxy.url, retry=FAST).jobs.list()) == []
        proxy.cut(*[0] * 50)
        with pytest.raises(Unreachable, match="cannot reach"):
            list(make(proxy.url, retry=FAST).jobs.list())
        assert proxy.accepted == FAST.attempts


class Canned:
    """An application that gives prepared answers, then an empty list; it remembers when it was asked."""

    def __init__(self, *answers: tuple[int, dict[str, str]]) -> None:
        self._answers = list(answers)
        self.asked: list[float] = []
        self.body = b'{"data": [], "has_more": false, "last_id": null}'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(time.monotonic())
        status, headers = self._answers.pop(0) if self._answers else (200, {})
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": self.body})


class TestAnswers:
    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after_is_honoured(self, make: Clients, status: int) -> None:
        app = Canned((status, {"Retry-After": "1"}))
        with listening(app, lifespan="off") as url:
            assert list(make(url, retry=FAST).jobs.list()) == []
        assert app.asked[1] - app.asked[0] >= 1.0

    def test_a_time_that_is_too_long_is_said_at_once(self, make: Clients) -> None:
        app = Canned((429, {"Retry-After": "3600"}))
        with listening(app, lifespan="off") as url, pytest.raises(TooManyRequests) as raised:
            list(make(url, retry=FAST).jobs.list())
        assert (len(app.asked), raised.value.retry_after_seconds) == (1, 3600.0)

    def test_other_failures_are_not_repeated(self, make: Clients) -> None:
        app = Canned((500, {}))
        with listening(app, lifespan="off") as url, pytest.raises(ServerError, match="answered 500"):
            list(make(url).jobs.list())
        assert len(app.asked) == 1

    @pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"id": 5}'])
    def test_another_server_is_noticed(self, make: Clients, body: bytes) -> None:
        app = Canned()
        app.body = body
        with listening(app, lifespan="off") as url, pytest.raises(UnexpectedAnswer):
            make(url).jobs.get("job_" + NOBODY)

    def test_fields_of_a_newer_server_are_left_out(
        self, make: Clients, client: Any, database: SyncDatabase
    ) -> None:
        job = client.jobs.get(queue_job(database).id)
        body = json.loads(job.model_dump_json(by_alias=True))
        body["new"], body["spec"]["method"]["new"], body["links"]["new"] = 1, 2, 3
        app = Canned()
        app.body = json.dumps(body).encode()
        with listening(app, lifespan="off") as url:
            assert make(url).jobs.get(job.id) == job

    def test_problems_have_classes(self, client: Any, database: SyncDatabase) -> None:
        with pytest.raises(NotFound, match="No such job") as missing:
            client.jobs.get("job_" + NOBODY)
        assert (missing.value.status, missing.value.code) == (404, "not_found")
        assert missing.value.request_id.startswith("req_")
        with pytest.raises(InvalidRequest, match="kept is a share and must be at most 1") as invalid:
            client.jobs.create(job_body(budget={"metric": "kept", "value": 1.5}))
        assert [(error.pointer, error.code) for error in invalid.value.errors] == [("/budget", "value_error")]
        with pytest.raises(Conflict):
            client.jobs.retry(queue_job(database).id)

    def test_a_body_that_cannot_be_right_is_not_sent(self, client: Any, database: SyncDatabase) -> None:
        with pytest.raises(ValidationError, match="bugdet"):
            client.jobs.create({**job_body(), "bugdet": 1})
        assert count(database, "job") == 0

    def test_a_full_queue(self, make: Clients, settings: Settings, database: SyncDatabase) -> None:
        queue_job(database)
        with serving(settings.model_copy(update={"max_queued_jobs": 1})) as url:
            with pytest.raises(TooManyRequests) as raised:
                make(url).jobs.create(job_body())
            assert (raised.value.code, raised.value.retry_after_seconds) == ("queue_full", 30.0)


class TestKeys:
    def test_a_key_is_made_used_and_revoked(self, make: Clients, settings: Settings, client: Any) -> None:
        made = client.api_keys.create({"name": "n", "scopes": ["jobs:read", "keys:manage"]})
        with serving(settings.model_copy(update={"auth_required": True})) as url:
            with pytest.raises(Unauthenticated):
                list(make(url).jobs.list())
            keyed = make(url, api_key=made.key)
            assert list(keyed.jobs.list()) == []
            assert [key.id for key in keyed.api_keys.list()] == [made.id]
            assert keyed.api_keys.revoke(made.id).revoked_at is not None
            with pytest.raises(Unauthenticated):
                keyed.api_keys.get(made.id)

    def test_projects_and_what_was_noted(self, client: Any) -> None:
        project = client.projects.create({"name": "search"})
        changed = client.projects.update(project.id, {"limits": {"queued_jobs": 5}})
        assert client.projects.get(project.id).limits.queued_jobs == changed.limits.queued_jobs == 5
        assert "search" in [found.name for found in client.projects.list()]
        assert "project.created" in [event.action for event in client.audit_events.list()]

    @pytest.mark.parametrize("key", ["hunter2", "okv_", "okv_a_b_c\r\nX: y", ""])
    def test_what_is_no_key_is_not_sent_nor_shown(self, key: str) -> None:
        with pytest.raises(ValueError, match="not an API key") as raised:
            OrthoKV("http://127.0.0.1:9", api_key=key)
        assert "hunter2" not in str(raised.value)

    def test_a_client_shows_no_key(self) -> None:
        with OrthoKV("http://127.0.0.1:9", api_key="okv_0_secret_0") as client:
            assert "secret" not in repr(client.settings)


def test_the_client_needs_neither_torch_nor_the_server_and_starts_at_once() -> None:
    code = """
import resource, sys
import orthokv_client
heavy = {"torch", "transformers", "numpy", "fastapi", "starlette", "sqlalchemy", "app", "workers"} & set(sys.modules)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(sorted(heavy), usage.ru_utime + usage.ru_stime)
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        heavy, spent = done.stdout.rsplit(" ", 1)
        assert heavy == "[]"
        seconds.append(float(spent))
    assert min(seconds) < 0.5


def test_every_operation_of_the_document_has_a_method() -> None:
    """What the API can do, the client can: a route that is added without one is noticed here."""
    document = json.loads((REPOSITORY / "openapi.json").read_text())
    operations = {
        operation["operationId"] for path in document["paths"].values() for operation in path.values()
    }
    sent_otherwise = {
        "datasets.create": "upload",
        "datasets.complete": "upload",
        "artifacts.content": "download",
        "artifacts.head_content": "download",
        "jobs.events": "events",
    }
    client = OrthoKV("http://127.0.0.1:9")
    for operation in sorted(operations - {"health.live", "health.ready", "usage.get"}):
        resource, _, name = operation.partition(".")
        assert callable(getattr(getattr(client, resource), sent_otherwise.get(operation, name))), operation
    assert callable(client.usage)
