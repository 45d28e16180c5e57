"""Hints through Redis: they wake a worker that would sleep for an hour, and nothing depends on them."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
import redis
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.hints.broker import CLOSE_SECONDS, CeleryDispatcher, make_celery, queue_of
from app.infra.database import SyncDatabase
from app.jobs.vocabulary import TERMINAL, JobStatus
from app.main import create_app
from app.settings import Settings
from tests.service.workers.test_supervisor import running, until
from tests.support.factories import Script, job_body, queue_job, read_job
from tests.support.paths import REPOSITORY
from tests.support.redis_server import PrivateRedis
from tests.support.tenants import OWNER

NOBODY = "redis://127.0.0.1:9/0"


@pytest.fixture
def gpu_class() -> str:
    """A queue that no other test hears."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def hinted(settings: Settings, broker_url: str, gpu_class: str) -> Settings:
    """Settings of a worker that wakes by hints only."""
    return settings.model_copy(
        update={
            "broker_url": broker_url,
            "gpu_classes": (gpu_class,),
            "idle_poll_seconds": 3600.0,
            "allowed_hosts": ("testserver",),
        }
    )


def test_a_hint_wakes_a_sleeping_worker(
    database: SyncDatabase, hinted: Settings, script: Script, gpu_class: str
) -> None:
    with running(hinted), TestClient(create_app(hinted), headers=OWNER) as client:
        for _ in range(2):  # the first may be found at the start, the second only by its hint
            job = client.post("/v1/jobs", json=job_body(gpu_class=gpu_class)).json()
            until(lambda: read_job(database, job["id"]).status in TERMINAL, "the job ends")  # noqa: B023
            assert read_job(database, job["id"]).status == JobStatus.SUCCEEDED
    assert [run["step"] for run in script.runs()].count("resolve") == 2


def test_a_redis_that_is_emptied_and_killed_costs_no_job(
    database: SyncDatabase, hinted: Settings, private_redis: PrivateRedis, gpu_class: str
) -> None:
    settings = hinted.model_copy(update={"broker_url": private_redis.url})
    dispatcher = CeleryDispatcher(private_redis.url)

    def run_one() -> None:
        job_id = queue_job(database, gpu_class=gpu_class).id

        def ended() -> bool:
            dispatcher.hint(gpu_class)  # as the reaper does again and again
            return read_job(database, job_id).status in TERMINAL

        until(ended, "the job ends")

    with running(settings):
        run_one()
        private_redis.empty()
        run_one()
        private_redis.kill()
        dispatcher.hint(gpu_class)  # into nothing
        private_redis.start()
        run_one()
    dispatcher.close()


def test_a_busy_worker_leaves_hints_to_others(
    database: SyncDatabase, hinted: Settings, private_redis: PrivateRedis, script: Script, gpu_class: str
) -> None:
    script.write({"step": "resolve", "run": 0, "do": "hang_until_released"})
    settings = hinted.model_copy(update={"broker_url": private_redis.url})
    key = f"orthokv:{queue_of(gpu_class)}"
    job = queue_job(database, gpu_class=gpu_class)
    with redis.Redis.from_url(private_redis.url) as client, running(settings):
        until(lambda: script.is_hanging("resolve"), "the worker is busy")
        for _ in range(3):
            dispatcher = CeleryDispatcher(private_redis.url)
            dispatcher.hint(gpu_class)
            dispatcher.close()
        # It found the job by itself, so its ear is free for one hint; a free worker would take all in no time.
        for _ in range(500):
            assert client.llen(key) >= 2
        script.go_on()
        until(lambda: read_job(database, job.id).status in TERMINAL, "the job ends")
        until(lambda: client.llen(key) == 0, "the idle worker takes the rest, too late to be of use")


def test_without_redis_workers_look_by_themselves(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    away = settings.model_copy(update={"broker_url": NOBODY})
    with running(away), TestClient(create_app(away), headers=OWNER) as client:
        posted = client.post("/v1/jobs", json=job_body())
        assert posted.status_code == 201
        until(lambda: read_job(database, posted.json()["id"]).status in TERMINAL, "the job ends")
    assert read_job(database, posted.json()["id"]).status == JobStatus.SUCCEEDED


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


@pytest.mark.parametrize("away", ["refusing", "silent"])
def test_a_hint_never_waits_for_redis(away: str, silent_url: str) -> None:
    dispatcher = CeleryDispatcher(NOBODY if away == "refusing" else silent_url)
    began = time.monotonic()
    for number in range(1000):
        dispatcher.hint(f"class-{number % 3}")
    assert time.monotonic() - began < 0.5
    dispatcher.close()
    assert time.monotonic() - began < CLOSE_SECONDS + 1


def test_hints_are_few_and_go_to_the_queue_of_their_class(private_redis: PrivateRedis) -> None:
    dispatcher = CeleryDispatcher(private_redis.url)
    for _ in range(1000):
        dispatcher.hint("h100")
    dispatcher.hint("l4")
    dispatcher.close()
    with redis.Redis.from_url(private_redis.url) as client:
        lengths = {key.decode(): client.llen(key) for key in client.scan_iter()}
    assert lengths.keys() == {f"orthokv:{queue_of('h100')}", f"orthokv:{queue_of('l4')}"}
    assert lengths[f"orthokv:{queue_of('l4')}"] == 1
    assert lengths[f"orthokv:{queue_of('h100')}"] < 1000  # waiting hints of a class are one


def test_only_redis_is_a_broker() -> None:
    with pytest.raises(ValidationError, match="must be a redis"):
        Settings(broker_url="filesystem://")


_WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))
import typer, app.cli
from app.main import create_app
from app.settings import Settings
{then}
"""


def python(missing: list[str], then: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(missing=missing, then=then)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin", **environment},
        check=False,
    )


def test_the_api_needs_neither_torch_nor_celery() -> None:
    missing = ["torch", "transformers", "safetensors", "celery", "kombu", "redis"]
    done = python(missing, "create_app(Settings()); from app import embedded")
    assert done.returncode == 0, done.stderr


def test_a_broker_without_its_library_is_one_sentence() -> None:
    then = "from app.starting import starting\nfrom app.hints.dispatch import make_dispatcher\n"
    then += "def run():\n    with starting():\n        make_dispatcher(Settings())\ntyper.run(run)"
    done = python(["celery"], then, ORTHOKV_BROKER_URL=NOBODY)
    assert done.returncode == 2
    assert done.stderr.strip() == "orthokv: ORTHOKV_BROKER_URL needs pip install 'orthokv[broker]'"


def test_a_hint_tells_no_more_than_that_there_is_work_and_no_pickle_is_taken(
    private_redis: PrivateRedis, gpu_class: str
) -> None:
    dispatcher = CeleryDispatcher(private_redis.url)
    dispatcher.hint(gpu_class)
    with redis.Redis.from_url(private_redis.url) as client:
        until(lambda: client.llen(f"orthokv:{queue_of(gpu_class)}"), "the hint arrives")
        message = json.loads(client.lindex(f"orthokv:{queue_of(gpu_class)}", 0))
    dispatcher.close()
    assert message["content-type"] == "application/json"
    assert message["headers"]["argsrepr"] == "()"
    arguments, options, _ = json.loads(base64.b64decode(message["body"]))
    assert (arguments, options) == ([], {})
    assert make_celery(private_redis.url).conf.accept_content == ["json"]
