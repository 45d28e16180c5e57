"""`kill -9` of the process that sends a webhook, after the receiver has answered and before the answer is written down."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from cryptography.fernet import Fernet

from app.migrate import upgrade
from tests.support.factories import job_body
from tests.support.fleet import Api
from tests.support.orthokv_server import Server, until
from tests.support.postgres import postgres_url
from tests.support.receiver import Receiver, Reply

pytestmark = pytest.mark.crash


@contextmanager
def started(kind: str, folder: Path) -> Iterator[Server]:
    """`orthokv serve` on SQLite, or `orthokv api` on Postgres, without a worker's work to do."""
    environment = {
        "ORTHOKV_OUTBOUND_PRIVATE_HOSTS": '["127.0.0.1"]',
        "ORTHOKV_WEBHOOK_TIMEOUT_SECONDS": "1",  # so a lease is 4 s
        "ORTHOKV_WEBHOOK_POLL_SECONDS": "0.05",
        "ORTHOKV_AUTH_REQUIRED": "false",
        "ORTHOKV_GPU_CLASSES": '["nobody"]',
    }
    if kind == "serve":
        with Server(folder / "data", environment) as server:
            yield server
        return
    with postgres_url() as database:
        upgrade(database)
        environment |= {
            "ORTHOKV_DATABASE_URL": database,
            "ORTHOKV_SECRET_KEYS": Fernet.generate_key().decode(),
            "ORTHOKV_DATA_DIR": str(folder / "api"),
        }
        with Api(folder / "api", environment) as api:
            yield api


@pytest.mark.parametrize("kind", ["serve", "api"])
def test_a_sender_killed_between_send_and_record_sends_again_under_the_same_id(
    kind: str, tmp_path: Path
) -> None:
    answer = threading.Event()
    with Receiver() as receiver, started(kind, tmp_path) as server:
        endpoint = server.post("/v1/webhook_endpoints", {"url": receiver.url, "event_types": ["job.created"]})
        receiver.replies = [Reply(hold=answer)]
        server.post("/v1/jobs", job_body(gpu_class="nobody"))
        until(lambda: receiver.requests, "the message is sent")
        # Stopped, it cannot read the answer; the answer is then in its socket, and it dies with it.
        server.process.send_signal(signal.SIGSTOP)
        answer.set()
        server.kill()
        server.start()
        path = f"/v1/webhook_endpoints/{endpoint['id']}/deliveries"

        def delivered() -> bool:
            return bool(server.get(path)["data"][0]["status"] == "succeeded")

        until(delivered, "the message is delivered")
        first, second = receiver.requests
        assert (first.id, first.body) == (second.id, second.body)
        for request in (first, second):
            request.verify(endpoint["secret"])
        (delivery,) = server.get(path)["data"]
        assert (delivery["id"], delivery["attempts"], delivery["response_status"]) == (first.id, 2, 200)


def test_a_kill_between_the_change_of_a_job_and_its_delivery_loses_neither(tmp_path: Path) -> None:
    """Many jobs, and kills in between: each job that was acknowledged is told, and no other."""
    with Receiver() as receiver, started("serve", tmp_path) as server:
        server.post("/v1/webhook_endpoints", {"url": receiver.url, "event_types": ["job.created"]})
        acknowledged: set[str] = set()
        for _ in range(3):
            stop = threading.Event()

            def submit(stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    try:
                        acknowledged.add(server.post("/v1/jobs", job_body(gpu_class="nobody"))["id"])
                    except httpx2.HTTPError:
                        return

            seen = len(acknowledged)
            thread = threading.Thread(target=submit)
            thread.start()
            until(lambda seen=seen: len(acknowledged) >= seen + 5, "jobs are acknowledged")
            server.kill()
            stop.set()
            thread.join()
            server.start()

        def told() -> set[str]:
            return {request.headers["webhook-id"] for request in receiver.requests}

        jobs = {job["id"] for job in server.get("/v1/jobs", limit=100)["data"]}
        assert len(jobs) < 100, "one page shows all"
        assert acknowledged <= jobs
        until(lambda: len(told()) >= len(jobs), "every job is told")
        assert {_job_of(request.body) for request in receiver.requests} == jobs
        assert len(told()) == len(jobs)


def _job_of(body: bytes) -> str:
    job_id: str = json.loads(body)["data"]["job_id"]
    return job_id
