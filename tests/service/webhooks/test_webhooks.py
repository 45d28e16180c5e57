"""Webhooks: endpoints, what is sent to them, and what happens when they do not take it. Real HTTP, on the loopback."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic import command
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError
from sqlalchemy import inspect, select, text, update
from sqlalchemy.orm import Session
from standardwebhooks import Webhook, WebhookVerificationError

from app.http.errors import PROBLEM_JSON
from app.infra.database import SyncDatabase, now
from app.infra.outbound import Outbound
from app.infra.sealing import CannotOpen, Sealer, make_sealer
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.migrate import alembic_config
from app.principal import DEFAULT_PROJECT_ID
from app.settings import Settings
from app.webhooks import attempts, repository
from app.webhooks.models import WebhookDelivery, WebhookEndpoint
from app.webhooks.sender import Sender, seal_anew
from app.webhooks.service import MAX_ENDPOINTS
from tests.support.factories import advance, claim_next, complete, job_body, must_claim, queue_job
from tests.support.orthokv_server import until
from tests.support.receiver import Receiver, Reply
from tests.support.tenants import OWNER, bearer, new_key, new_project, principal_of

URL = "https://hooks.example.com/orthokv"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "secret_keys": SecretStr(Fernet.generate_key().decode()),
            "outbound_private_hosts": ("127.0.0.1",),
            "webhook_timeout_seconds": 2.0,
            "webhook_poll_seconds": 0.01,
        }
    )


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def make_sender(settings: Settings, database: SyncDatabase) -> Sender:
    outbound = Outbound(
        private_hosts=settings.outbound_private_hosts, timeout_seconds=settings.webhook_timeout_seconds
    )
    return Sender(database, make_sealer(settings), outbound, settings)


@pytest.fixture
def sender(settings: Settings, database: SyncDatabase) -> Sender:
    return make_sender(settings, database)


def subscribe(client: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/webhook_endpoints", json={"url": url, **fields})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def deliveries(client: TestClient, endpoint: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    path = f"/v1/webhook_endpoints/{endpoint['id']}/deliveries"
    found: list[dict[str, Any]] = client.get(path, params={"order": "asc", **query}).json()["data"]
    return found


def read_endpoint(client: TestClient, endpoint: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/webhook_endpoints/{endpoint['id']}").json()
    return found


def hurry(database: SyncDatabase) -> None:
    """Let every wait between two attempts be over."""
    database.write(lambda session: session.execute(update(WebhookDelivery).values(next_attempt_at=now(-1.0))))


def wait_of(database: SyncDatabase) -> float:
    """Seconds between the last attempt of the only delivery and the next one."""

    def read(session: Session) -> float:
        row = session.execute(select(WebhookDelivery)).scalar_one()
        assert row.last_attempt_at is not None
        return (row.next_attempt_at - row.last_attempt_at).total_seconds()

    return database.read(read)


class TestEndpoints:
    def test_the_secret_is_shown_once_and_stored_sealed(
        self, client: TestClient, database: SyncDatabase, settings: Settings
    ) -> None:
        made = subscribe(client, URL, description="ours", event_types=["job.failed", "job.succeeded"])
        secret = made.pop("secret")
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
        assert read_endpoint(client, made) == made
        assert client.get("/v1/webhook_endpoints").json()["data"] == [made]
        row = database.read(lambda session: session.execute(select(WebhookEndpoint)).scalar_one())
        assert secret not in row.secret
        sealer = make_sealer(settings)
        assert sealer is not None
        assert sealer.open(row.secret) == secret

    def test_a_change_keeps_what_it_does_not_name(self, client: TestClient) -> None:
        made = subscribe(client, URL, description="ours", event_types=["job.failed"])
        path = f"/v1/webhook_endpoints/{made['id']}"
        changed = client.patch(path, json={"url": "https://other.example.com/"}).json()
        del made["secret"]
        assert changed == {**made, "url": "https://other.example.com/"}
        changed = client.patch(path, json={"event_types": None, "cloud_events": True}).json()
        assert (changed["event_types"], changed["cloud_events"], changed["description"]) == (
            None,
            True,
            "ours",
        )

    @pytest.mark.parametrize(
        "url", ["http://hooks.example.com/", "https://10.0.0.1/", "https://u:canary@x.example/"]
    )
    def test_a_url_that_is_not_safe_is_refused_at_once(self, client: TestClient, url: str) -> None:
        made = subscribe(client, URL)
        answers = [
            client.post("/v1/webhook_endpoints", json={"url": url}),
            client.patch(f"/v1/webhook_endpoints/{made['id']}", json={"url": url}),
        ]
        for answer in answers:
            assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM_JSON)
            assert answer.json()["errors"][0]["pointer"] == "/url"
            assert "canary" not in answer.text
        assert read_endpoint(client, made)["url"] == URL

    @pytest.mark.parametrize(
        "fields",
        [
            {"event_types": []},
            {"event_types": ["job.unheard_of"]},
            {"secret": "whsec_mine"},
            {"url": ""},
            {"description": "x" * 256},
        ],
        ids=str,
    )
    def test_other_bad_fields_are_refused(self, client: TestClient, fields: dict[str, Any]) -> None:
        assert client.post("/v1/webhook_endpoints", json={"url": URL, **fields}).status_code == 422

    def test_a_server_without_a_key_refuses_in_one_sentence(self, settings: Settings) -> None:
        keyless = settings.model_copy(update={"secret_keys": SecretStr("")})
        with TestClient(create_app(keyless), headers=OWNER) as client:
            answer = client.post("/v1/webhook_endpoints", json={"url": URL})
        assert (answer.status_code, answer.json()["code"]) == (422, "webhooks_disabled")
        assert "ORTHOKV_SECRET_KEYS" in answer.json()["detail"]

    def test_a_project_has_room_for_so_many(self, client: TestClient, database: SyncDatabase) -> None:
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda _: client.post("/v1/webhook_endpoints", json={"url": URL}).status_code,
                    range(MAX_ENDPOINTS + 4),
                )
            )
        assert (answers.count(201), answers.count(403)) == (MAX_ENDPOINTS, 4)

    def test_a_deleted_endpoint_takes_its_deliveries_and_secrets_along(
        self, client: TestClient, database: SyncDatabase, sender: Sender
    ) -> None:
        made = subscribe(client, URL)
        queue_job(database)
        assert client.delete(f"/v1/webhook_endpoints/{made['id']}").status_code == 204
        assert client.get(f"/v1/webhook_endpoints/{made['id']}").status_code == 404
        for table in (WebhookEndpoint, WebhookDelivery):
            assert database.read(lambda session, table=table: session.execute(select(table)).all()) == []
        assert not sender.send_next()

    def test_acts_are_recorded_without_url_and_secret(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        made = subscribe(client, "https://hooks.example.com/canary")
        path = f"/v1/webhook_endpoints/{made['id']}"
        queue_job(database)
        client.post(f"{path}/deliveries/{deliveries(client, made)[0]['id']}/redeliver")
        client.post(f"{path}/rotate_secret", json={})
        client.patch(path, json={"url": "https://hooks.example.com/canary/2"})
        client.delete(path)
        answer = client.get("/v1/audit_events", params={"order": "asc"})
        assert [event["action"] for event in answer.json()["data"] if "webhook" in event["action"]] == [
            "webhook_endpoint.created",
            "webhook_delivery.redelivered",
            "webhook_endpoint.secret_rotated",
            "webhook_endpoint.changed",
            "webhook_endpoint.deleted",
        ]
        assert "canary" not in answer.text
        assert "whsec_" not in answer.text


class TestMessages:
    def test_a_receiver_can_verify_what_it_gets(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        job = queue_job(database)
        assert sender.send_next()
        (request,) = receiver.requests
        message = request.verify(made["secret"])
        assert message["type"] == "job.created"
        assert message["data"] == {
            "job_id": job.id,
            "kind": "compress",
            "status": "queued",
            "attempt": 1,
            "event_seq": 1,
            "profile_id": None,
            "checkpoint_id": None,
            "error_code": None,
        }
        assert abs(datetime.fromisoformat(message["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
        assert len(request.body) < 20_000
        assert request.headers["content-type"] == "application/json"
        # By hand as well: the library above also signs.
        key = base64.b64decode(made["secret"].removeprefix("whsec_"))
        signed = f"{request.id}.{request.headers['webhook-timestamp']}.".encode() + request.body
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert request.headers["webhook-signature"] == f"v1,{expected}"
        with pytest.raises(WebhookVerificationError):
            request.verify(subscribe(client, URL)["secret"])
        (delivery,) = deliveries(client, made)
        assert (delivery["id"], delivery["status"], delivery["attempts"]) == (request.id, "succeeded", 1)
        assert (delivery["response_status"], delivery["error"], delivery["next_attempt_at"]) == (
            200,
            None,
            None,
        )
        assert not sender.send_next()

    def test_each_change_of_a_job_is_told(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        job = complete(database, queue_job(database).id)
        cancelled = queue_job(database)
        client.post(f"/v1/jobs/{cancelled.id}/cancel")
        client.post(f"/v1/jobs/{cancelled.id}/retry")
        while sender.send_next():
            pass
        told = [request.verify(made["secret"]) for request in receiver.requests]
        told = sorted(told, key=lambda message: (message["data"]["job_id"], message["data"]["event_seq"]))
        types = [message["type"] for message in told]
        assert types == [
            "job.created",
            "job.started",
            "job.succeeded",
            "job.created",
            "job.cancelled",
            "job.retried",
        ]
        assert told[2]["data"]["checkpoint_id"] == (job.result and job.result.checkpoint_id)
        # What was told is what happened: the same types under the same numbers.
        events = client.get(f"/v1/jobs/{job.id}/events", params={"limit": 1000}).json()["data"]
        by_number = {event["seq"]: event["type"] for event in events}
        assert all(by_number[message["data"]["event_seq"]] == message["type"] for message in told[:3])

    def test_an_endpoint_gets_the_types_that_it_asked_for(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        all_types, some = subscribe(client, URL), subscribe(client, URL, event_types=["job.succeeded"])
        complete(database, queue_job(database).id)
        assert {one["type"] for one in deliveries(client, all_types)} == {
            "job.created",
            "job.started",
            "job.succeeded",
        }
        assert [one["type"] for one in deliveries(client, some)] == ["job.succeeded"]

    def test_a_delivery_is_written_if_and_only_if_the_change_is(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        made = subscribe(client, URL)
        job = queue_job(database)
        before = deliveries(client, made)

        class Crash(Exception):
            pass

        def crash_after_transition(session: Session) -> None:
            from app.jobs.service import cancel

            cancel(session, job_id=job.id, principal=principal_of(DEFAULT_PROJECT_ID))
            session.flush()
            raise Crash

        with pytest.raises(Crash):
            database.write(crash_after_transition)
        assert deliveries(client, made) == before
        assert client.get(f"/v1/jobs/{job.id}").json()["status"] == "queued"

    def test_another_project_is_told_nothing(self, client: TestClient, database: SyncDatabase) -> None:
        key = new_key(database, new_project(database, "other"))
        theirs = client.post("/v1/webhook_endpoints", json={"url": URL}, headers=bearer(key)).json()
        queue_job(database)
        path = f"/v1/webhook_endpoints/{theirs['id']}/deliveries"
        assert client.get(path, headers=bearer(key)).json()["data"] == []

    def test_cloud_events_headers_come_on_request(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url, cloud_events=True)
        job = queue_job(database)
        sender.send_next()
        (request,) = receiver.requests
        headers = {name: value for name, value in request.headers.items() if name.startswith("ce-")}
        assert datetime.fromisoformat(headers.pop("ce-time")).tzinfo is not None
        assert headers == {
            "ce-specversion": "1.0",
            "ce-id": request.id,
            "ce-type": "orthokv.job.created",
            "ce-source": f"/v1/projects/{DEFAULT_PROJECT_ID}",
            "ce-subject": job.id,
        }
        request.verify(made["secret"])


class TestRetries:
    def test_the_schedule_is_kept_with_jitter_and_then_the_endpoint_is_disabled(
        self,
        client: TestClient,
        database: SyncDatabase,
        sender: Sender,
        receiver: Receiver,
        settings: Settings,
    ) -> None:
        made = subscribe(client, receiver.url)
        receiver.default = Reply(500, body=b"broken")
        queue_job(database)
        schedule = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
        assert settings.webhook_retry_seconds == schedule
        waits = []
        for _ in schedule:
            assert sender.send_next()
            waits.append(wait_of(database))
            assert not sender.send_next()  # not before its time
            hurry(database)
        ratios = [wait / planned for wait, planned in zip(waits, schedule, strict=True)]
        assert all(0.89 < ratio < 1.15 for ratio in ratios), ratios
        assert len({round(ratio, 3) for ratio in ratios}) > 3, "no jitter"
        assert read_endpoint(client, made)["enabled"]
        queue_job(database)  # waits behind, and ends with the endpoint
        database.write(  # the first message's last attempt comes first
            lambda session: session.execute(
                update(WebhookDelivery).where(WebhookDelivery.attempts == 0).values(next_attempt_at=now(60.0))
            )
        )
        assert sender.send_next()
        first, second = deliveries(client, made)
        assert (first["status"], first["attempts"], first["response_status"]) == ("failed", 10, 500)
        assert first["response_body"] == "broken"
        assert (second["status"], second["attempts"]) == ("failed", 0)
        shown = read_endpoint(client, made)
        assert (shown["enabled"], shown["disabled_reason"]) == (False, "failing")
        assert shown["disabled_at"] is not None
        assert len({request.id for request in receiver.requests}) == 1
        assert len({request.body for request in receiver.requests}) == 1
        (event,) = client.get("/v1/audit_events", params={"action": "webhook_endpoint.disabled"}).json()[
            "data"
        ]
        assert (event["actor"], event["subject_id"], event["data"]) == (
            "system",
            made["id"],
            {"reason": "failing"},
        )
        queue_job(database)
        assert len(deliveries(client, made)) == 2, "a disabled endpoint is told nothing"

    def test_one_message_that_is_never_taken_does_not_disable_an_endpoint_that_takes_others(
        self, client: TestClient, database: SyncDatabase, receiver: Receiver, settings: Settings
    ) -> None:
        sender = make_sender(settings.model_copy(update={"webhook_retry_seconds": (1000.0,)}), database)
        made = subscribe(client, receiver.url)
        queue_job(database)
        receiver.replies = [Reply(500)]
        sender.send_next()
        queue_job(database)
        time.sleep(0.01)
        assert sender.send_next()
        receiver.replies = [Reply(500)]
        hurry(database)
        assert sender.send_next()
        assert [one["status"] for one in deliveries(client, made)] == ["failed", "succeeded"]
        assert read_endpoint(client, made)["enabled"]

    @pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 400, 404, 429, 500, 503])
    def test_only_2xx_is_success(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver, status: int
    ) -> None:
        made = subscribe(client, receiver.url)
        receiver.replies = [Reply(status, {"Location": receiver.url}), Reply(204)]
        queue_job(database)
        sender.send_next()
        assert len(receiver.requests) == 1
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["response_status"]) == ("pending", status)
        assert str(status) in delivery["error"]
        hurry(database)
        sender.send_next()
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["attempts"], delivery["error"]) == ("succeeded", 2, None)
        first, second = receiver.requests
        assert first.id == second.id
        assert first.body == second.body

    def test_410_disables_at_once(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        queue_job(database)
        queue_job(database)
        receiver.replies = [Reply(410)]
        assert sender.send_next()
        assert not sender.send_next()
        shown = read_endpoint(client, made)
        assert (shown["enabled"], shown["disabled_reason"]) == (False, "gone")
        assert [one["status"] for one in deliveries(client, made)] == ["failed", "failed"]
        path = f"/v1/webhook_endpoints/{made['id']}"
        again = client.patch(path, json={"enabled": True}).json()
        assert (again["enabled"], again["disabled_reason"], again["disabled_at"]) == (True, None, None)
        queue_job(database)
        assert sender.send_next()
        assert len(receiver.requests) == 2

    def test_retry_after_is_honoured(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        subscribe(client, receiver.url)
        receiver.replies = [Reply(429, {"Retry-After": "120"}), Reply(503, {"Retry-After": "1"})]
        queue_job(database)
        sender.send_next()
        assert wait_of(database) == pytest.approx(120, abs=5)
        hurry(database)
        sender.send_next()
        assert wait_of(database) > 269, "sooner than the schedule is not sooner"

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ("0", 0),
            ("90", 90),
            ("999999999", 86_400),
            ("-5", 0),
            ("soon", 0),
            ("", 0),
            ("１２", 12),
            ("Wed, 25 Nov 2026 12:00:30 GMT", 30),
            ("Wed, 25 Nov 2026 11:00:00 GMT", 0),
            ("Wed, 25 Nov 2026 12:00:30", 0),
        ],
    )
    def test_retry_after_as_seconds_and_as_a_date(self, header: str, seconds: float) -> None:
        moment = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)
        assert attempts.retry_after(header, moment) == seconds

    def test_a_receiver_that_does_not_answer_in_time_is_tried_again(
        self, client: TestClient, database: SyncDatabase, receiver: Receiver, settings: Settings
    ) -> None:
        sender = make_sender(settings.model_copy(update={"webhook_timeout_seconds": 0.3}), database)
        made = subscribe(client, receiver.url)
        release = threading.Event()
        receiver.replies = [Reply(hold=release)]
        queue_job(database)
        assert sender.send_next()
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["response_status"]) == ("pending", None)
        assert "no answer in time" in delivery["error"]
        release.set()

    def test_a_receiver_that_is_away_is_tried_again(
        self, client: TestClient, database: SyncDatabase, sender: Sender
    ) -> None:
        with Receiver() as gone:
            made = subscribe(client, gone.url)
        queue_job(database)
        assert sender.send_next()
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["error"]) == ("pending", "Not delivered: no connection.")

    def test_a_host_that_has_become_private_is_not_called(
        self, client: TestClient, database: SyncDatabase, settings: Settings
    ) -> None:
        outbound = Outbound(resolve=lambda host, port: ["127.0.0.1"])
        sender = Sender(database, make_sealer(settings), outbound, settings)
        made = subscribe(client, URL)
        queue_job(database)
        assert sender.send_next()
        (delivery,) = deliveries(client, made)
        assert delivery["error"] == "Not delivered: the host has no public address."

    def test_a_response_is_kept_to_2048_bytes_and_as_text(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        receiver.replies = [Reply(500, body=b"\0\xff" + b"x" * 100_000)]
        queue_job(database)
        sender.send_next()
        (delivery,) = deliveries(client, made)
        assert delivery["response_body"] == "��" + "x" * 2046


class TestRotation:
    def test_both_secrets_sign_until_the_old_one_ends(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        old = subscribe(client, receiver.url)
        path = f"/v1/webhook_endpoints/{old['id']}"
        new = client.post(f"{path}/rotate_secret", json={"overlap_hours": 1}).json()
        assert new["secret"] != old["secret"]
        assert new["previous_secret_expires_at"] is not None
        queue_job(database)
        sender.send_next()
        (request,) = receiver.requests
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        assert request.verify(old["secret"]) == request.verify(new["secret"])

        database.write(
            lambda session: session.execute(
                update(WebhookEndpoint).values(previous_secret_expires_at=now(-0.001))
            )
        )
        queue_job(database)
        sender.send_next()
        request = receiver.requests[-1]
        request.verify(new["secret"])
        with pytest.raises(WebhookVerificationError):
            request.verify(old["secret"])
        sender.tidy()
        row = database.read(lambda session: session.execute(select(WebhookEndpoint)).scalar_one())
        assert (row.previous_secret, row.previous_secret_expires_at) == (None, None)

    def test_without_an_overlap_the_old_secret_ends_at_once(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        old = subscribe(client, receiver.url)
        path = f"/v1/webhook_endpoints/{old['id']}/rotate_secret"
        new = client.post(path, json={"overlap_hours": 0}).json()
        queue_job(database)
        sender.send_next()
        receiver.requests[0].verify(new["secret"])
        assert len(receiver.requests[0].headers["webhook-signature"].split(" ")) == 1


class TestRedelivery:
    def test_sends_the_same_message_under_the_same_id(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        queue_job(database)
        sender.send_next()
        (delivery,) = deliveries(client, made)
        path = f"/v1/webhook_endpoints/{made['id']}/deliveries/{delivery['id']}/redeliver"
        answer = client.post(path)
        assert (answer.status_code, answer.json()["status"]) == (202, "pending")
        assert sender.send_next()
        first, second = receiver.requests
        assert (first.id, first.body) == (second.id, second.body)
        assert [one["attempts"] for one in deliveries(client, made)] == [2]

    def test_begins_the_schedule_anew(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        receiver.default = Reply(500)
        queue_job(database)
        for _ in range(4):
            hurry(database)
            sender.send_next()
        (delivery,) = deliveries(client, made)
        client.post(f"/v1/webhook_endpoints/{made['id']}/deliveries/{delivery['id']}/redeliver")
        assert sender.send_next()
        assert wait_of(database) == pytest.approx(5, rel=0.2)

    def test_is_refused_while_the_endpoint_is_disabled_or_the_delivery_under_way(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        made = subscribe(client, URL)
        queue_job(database)
        (delivery,) = deliveries(client, made)
        path = f"/v1/webhook_endpoints/{made['id']}/deliveries/{delivery['id']}/redeliver"
        assert database.write(attempts.claim, lease_seconds=60.0) is not None
        assert client.post(path).status_code == 409
        client.patch(f"/v1/webhook_endpoints/{made['id']}", json={"enabled": False})
        assert client.post(path).status_code == 409

    def test_a_delivery_of_another_endpoint_is_not_there(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        made, other = subscribe(client, URL), subscribe(client, URL)
        queue_job(database)
        (delivery,) = deliveries(client, made)
        path = f"/v1/webhook_endpoints/{other['id']}/deliveries/{delivery['id']}/redeliver"
        assert client.post(path).status_code == 404


class TestSenders:
    def test_many_senders_send_each_message_once(
        self, client: TestClient, database: SyncDatabase, settings: Settings, receiver: Receiver
    ) -> None:
        for _ in range(5):
            subscribe(client, receiver.url)
        several = settings.model_copy(update={"webhook_senders": 3})
        databases = [SyncDatabase(settings.resolved_database_url) for _ in range(3)]
        senders = [make_sender(several, one) for one in databases]
        for one in senders:
            one.start()
        for _ in range(8):
            queue_job(database)
        until(lambda: len(receiver.requests) >= 40, "all are sent")
        time.sleep(0.3)
        for one in senders:
            one.stop()
        for one in databases:
            one.close()
        ids = [request.id for request in receiver.requests]
        assert len(ids) == len(set(ids)) == 40
        statuses = database.read(
            lambda session: session.execute(select(WebhookDelivery.status)).scalars().all()
        )
        assert statuses == ["succeeded"] * 40

    def test_a_sender_that_died_before_its_record_leaves_a_repeat_with_the_same_id(
        self,
        client: TestClient,
        database: SyncDatabase,
        sender: Sender,
        settings: Settings,
        receiver: Receiver,
    ) -> None:
        made = subscribe(client, receiver.url)
        queue_job(database)
        dead = database.write(attempts.claim, lease_seconds=60.0)
        assert dead is not None
        sealer = make_sealer(settings)
        assert sealer is not None
        outcome = attempts.send(
            dead, sealer=sealer, outbound=Outbound(private_hosts=["127.0.0.1"], timeout_seconds=2)
        )
        assert not sender.send_next(), "the lease keeps others away"
        database.write(
            lambda session: session.execute(update(WebhookDelivery).values(lease_expires_at=now(-0.001)))
        )
        assert sender.send_next()
        first, second = receiver.requests
        assert (first.id, first.body) == (second.id, second.body)
        # The dead one comes back: its record is of an attempt that is no longer the last.
        database.write(attempts.record, dead, attempts.Outcome("late"), schedule=(5.0,))
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["attempts"], delivery["error"]) == ("succeeded", 2, None)
        assert outcome.status == 200

    def test_a_slow_endpoint_holds_one_sender_only(self, client: TestClient, database: SyncDatabase) -> None:
        slow, fast = subscribe(client, URL), subscribe(client, URL)
        queue_job(database)
        queue_job(database)
        claimed = [database.write(attempts.claim, lease_seconds=60.0) for _ in range(3)]
        assert {one.endpoint_id for one in claimed if one} == {slow["id"], fast["id"]}
        assert claimed[2] is None

    def test_an_endpoint_that_is_disabled_or_deleted_meanwhile_gets_no_more(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        made = subscribe(client, URL)
        queue_job(database)
        attempt = database.write(attempts.claim, lease_seconds=60.0)
        assert attempt is not None
        client.patch(f"/v1/webhook_endpoints/{made['id']}", json={"enabled": False})
        database.write(attempts.record, attempt, attempts.Outcome("no answer"), schedule=(5.0,))
        (delivery,) = deliveries(client, made)
        assert delivery["status"] == "failed"
        assert read_endpoint(client, made)["disabled_reason"] == "client"
        client.delete(f"/v1/webhook_endpoints/{made['id']}")
        database.write(attempts.record, attempt, attempts.Outcome(None, 200), schedule=(5.0,))

    def test_old_deliveries_are_forgotten(
        self, client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        for _ in range(2):
            queue_job(database)
            assert sender.send_next()
        first = deliveries(client, made)[0]["id"]
        old = (
            update(WebhookDelivery).where(WebhookDelivery.id == first).values(finished_at=now(-31 * 86_400.0))
        )
        database.write(lambda session: session.execute(old))
        sender.tidy()
        assert [one["id"] for one in deliveries(client, made)] == [
            one for one in {request.id for request in receiver.requests} if one != first
        ]

    def test_the_server_itself_sends(self, settings: Settings, receiver: Receiver) -> None:
        with TestClient(
            create_app(settings.model_copy(update={"webhook_senders": 2})), headers=OWNER
        ) as client:
            made = subscribe(client, receiver.url)
            client.post("/v1/jobs", json=job_body())
            until(lambda: receiver.requests, "a message comes")
            receiver.requests[0].verify(made["secret"])


class TestSealing:
    def test_keys_can_be_changed_without_losing_a_secret(
        self, client: TestClient, database: SyncDatabase, settings: Settings, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        rotated = client.post(f"/v1/webhook_endpoints/{made['id']}/rotate_secret", json={}).json()
        old_key, new_key = settings.secret_keys.get_secret_value(), Fernet.generate_key().decode()
        both = Sealer((new_key, old_key))
        assert database.write(seal_anew, both) == 1
        assert database.write(seal_anew, both) == 0
        row = database.read(lambda session: session.execute(select(WebhookEndpoint)).scalar_one())
        assert row.previous_secret is not None
        alone = Sealer((new_key,))
        assert [alone.open(sealed) for sealed in (row.secret, row.previous_secret)] == [
            rotated["secret"],
            made["secret"],
        ]
        with pytest.raises(CannotOpen):
            Sealer((old_key,)).open(row.secret)

    def test_a_secret_that_no_key_opens_is_said_and_its_deliveries_wait(
        self, client: TestClient, database: SyncDatabase, settings: Settings, receiver: Receiver
    ) -> None:
        made = subscribe(client, receiver.url)
        other = settings.model_copy(update={"secret_keys": SecretStr(Fernet.generate_key().decode())})
        sender = make_sender(other, database)
        queue_job(database)
        assert sender.send_next()
        sender.tidy()
        (delivery,) = deliveries(client, made)
        assert (delivery["status"], delivery["error"]) == (
            "pending",
            "The server cannot read the endpoint's secret.",
        )
        assert receiver.requests == []

    @pytest.mark.parametrize(
        "value",
        ["canary-short", "é" * 44, Fernet.generate_key().decode() + ",x"],
        ids=["short", "other letters", "a key and more"],
    )
    def test_what_is_no_key_is_refused_without_repeating_it(self, value: str) -> None:
        with pytest.raises(ValidationError) as refusal:
            Settings.model_validate({"secret_keys": value})
        (error,) = refusal.value.errors(include_input=False, include_url=False)
        assert "Fernet" in error["msg"]
        assert value not in str(refusal.value)


def test_a_body_is_sent_byte_for_byte_as_it_is_stored(
    client: TestClient, database: SyncDatabase, sender: Sender, receiver: Receiver
) -> None:
    subscribe(client, receiver.url)
    queue_job(database)
    stored = database.read(
        lambda session: session.execute(text("SELECT body FROM webhook_delivery")).scalar_one()
    )
    sender.send_next()
    assert receiver.requests[0].body == stored.encode()
    assert json.loads(stored)["type"] == "job.created"


def test_nothing_waits_for_an_endpoint_that_was_disabled_in_the_same_moment(
    client: TestClient, database: SyncDatabase, sender: Sender
) -> None:
    made = subscribe(client, URL)
    queue_job(database)
    database.write(lambda session: session.execute(update(WebhookEndpoint).values(enabled=False)))
    assert database.read(repository.anything_due)
    sender.tidy()
    assert not database.read(repository.anything_due)
    assert [one["status"] for one in deliveries(client, made)] == ["failed"]


def test_a_failed_job_is_told_with_its_code(client: TestClient, database: SyncDatabase) -> None:
    from app.jobs.lease import Failure, RetryPolicy, fail
    from app.jobs.vocabulary import JobErrorCode

    made = subscribe(client, URL, event_types=["job.failed"])
    job = queue_job(database)
    lease = advance(database, job.id, StepName.CALIBRATE)
    failure = Failure(JobErrorCode.DATASET_INVALID, "a message that stays here", retryable=False)
    database.write(fail, lease, failure, RetryPolicy(1, 0.01))
    (delivery,) = deliveries(client, made)
    body = database.read(lambda session: session.get_one(WebhookDelivery, delivery["id"]).body)
    assert json.loads(body)["data"]["error_code"] == "dataset_invalid"
    assert "stays here" not in body


def test_workers_write_deliveries_while_endpoints_are_deleted(
    client: TestClient, database: SyncDatabase, settings: Settings
) -> None:
    """A transition never fails because of an endpoint, and never waits for a sender's record for long."""
    made = [subscribe(client, URL) for _ in range(10)]
    for _ in range(10):
        queue_job(database)

    def work(number: int) -> None:
        own = SyncDatabase(settings.resolved_database_url)
        try:
            for _ in range(5):
                claim_next(own, f"worker-{number}")
        finally:
            own.close()

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, number) for number in range(2)]
        for one in made:
            assert client.delete(f"/v1/webhook_endpoints/{one['id']}").status_code == 204
        for worker in workers:
            worker.result()
    assert claim_next(database) is None
    queue_job(database)
    must_claim(database)


def test_the_library_that_signs_refuses_an_old_message() -> None:
    secret = "whsec_" + base64.b64encode(b"0" * 32).decode()
    old = datetime.now(UTC) - timedelta(hours=1)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(old.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", old, "{}"),
    }
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(secret).verify("{}", headers)


def test_no_other_field_of_a_request_is_a_url(client: TestClient) -> None:
    """Who adds one has to say what checks it: `app/infra/outbound.py`."""
    document = client.get("/openapi.json").json()
    bodies = {
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for methods in document["paths"].values()
        for operation in methods.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    reached, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += re.findall(
                r"#/components/schemas/(\w+)", json.dumps(document["components"]["schemas"][name])
            )
    fields = {
        f"{name}.{field}"
        for name in reached
        for field in document["components"]["schemas"][name].get("properties", {})
    }
    suspects = {
        field
        for field in fields
        if re.search(r"ur[il]|host|endpoint|address|href|link", field.partition(".")[2])
    }
    assert suspects == {"WebhookEndpointCreate.url", "WebhookEndpointUpdate.url"}
    assert len(fields) > 30
    for model in (
        "https://hooks.example.com/model",
        "http://169.254.169.254/latest",
        "s3://bucket/model",
        "file:///etc",
    ):
        assert client.post("/v1/jobs", json=job_body(model={"id": model})).status_code == 422


def test_the_migration_can_be_undone(database_url: str) -> None:
    database = SyncDatabase(database_url)
    try:
        for revision, has in (("0003", False), ("head", True)):
            with database.engine.connect() as connection:
                config = alembic_config(database_url)
                config.attributes["connection"] = connection
                (command.upgrade if has else command.downgrade)(config, revision)
            assert ("webhook_endpoint" in inspect(database.engine).get_table_names()) is has
    finally:
        database.close()
