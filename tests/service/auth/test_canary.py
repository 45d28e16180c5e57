"""Secrets go where they must and nowhere else: a real server is given some, and all that it leaves behind is searched."""

from __future__ import annotations

import base64
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet
from sqlalchemy import MetaData, text
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.migrate import upgrade
from app.principal import DEFAULT_PROJECT_ID, Scope
from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.receiver import Receiver, Reply
from tests.support.tenants import bearer, new_key

pytestmark = pytest.mark.slow  # real processes, one after the other

URL_TOKEN = "the token in a URL"


def dump(url: str) -> str:
    """Every value of every table, as text."""
    database = SyncDatabase(url)

    def read(session: Session) -> str:
        found = MetaData()
        found.reflect(session.connection())
        return "\n".join(
            repr(row)
            for table in found.tables.values()
            for row in session.execute(text(f'SELECT * FROM "{table.name}"'))
        )

    try:
        return database.read(read)
    finally:
        database.close()


def contents(folder: Path) -> bytes:
    """All bytes of all files below a folder, and their names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(str(path).encode() + b"\n" + path.read_bytes() for path in files)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_no_log_no_database_and_no_error_holds_a_secret(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = Script(tmp_path / "script")
    data = tmp_path / "data"
    if kind == "postgres":
        from tests.service.conftest import empty

        url = request.getfixturevalue("postgres")
        empty(url)
    else:
        data.mkdir()
        url = f"sqlite:///{data / 'orthokv.db'}"
        upgrade(url)
    canaries = {
        "the key of the secrets": Fernet.generate_key().decode(),
        "the pepper": "canary-pepper-5f1c9a",
        "a hub token": "hf_canary7d20",
        URL_TOKEN: "canary-url-4e8b",
        "an invalid key": "okv_canary-not-a-key",
    }
    database = SyncDatabase(url)
    pepper = canaries["the pepper"]
    key = _peppered_key(database, pepper)
    database.close()
    canaries["an API key"] = key
    canaries["the secret part of an API key"] = key.split("_")[2]
    environment = {
        "ORTHOKV_DATABASE_URL": url,
        "ORTHOKV_SECRET_KEYS": canaries["the key of the secrets"],
        "ORTHOKV_KEY_PEPPER": pepper,
        "ORTHOKV_AUTH_REQUIRED": "true",
        "ORTHOKV_OUTBOUND_PRIVATE_HOSTS": '["127.0.0.1"]',
        "ORTHOKV_WEBHOOK_POLL_SECONDS": "0.05",
        "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
        "ORTHOKV_IDLE_POLL_SECONDS": "0.1",
        "HF_TOKEN": canaries["a hub token"],
    }
    errors: list[str] = []
    headers = bearer(key)
    with Receiver() as receiver, Server(data, environment) as server:
        receiver.replies = [Reply(500), Reply(302, {"Location": "http://127.0.0.1:1/"})]

        def call(method: str, path: str, body: Any = None, **more: Any) -> Any:
            response = httpx2.request(
                method, server.url + path, json=body, headers=headers, timeout=60, **more
            )
            if response.status_code >= 400:
                errors.append(response.text + str(response.headers))
            return response

        hook = call(
            "POST", "/v1/webhook_endpoints", {"url": f"{receiver.url}?token={canaries[URL_TOKEN]}"}
        ).json()
        rotated = call("POST", f"/v1/webhook_endpoints/{hook['id']}/rotate_secret", {}).json()
        for name, made in (("a webhook secret", hook), ("a rotated webhook secret", rotated)):
            canaries[name] = made["secret"].removeprefix("whsec_")
            canaries[f"{name}, raw"] = base64.b64decode(canaries[name]).hex()
        second = call("POST", "/v1/api_keys", {"name": "second", "scopes": ["jobs:read"]}).json()["key"]
        canaries["another API key"] = second
        job = call("POST", "/v1/jobs", job_body()).json()
        until(lambda: call("GET", f"/v1/jobs/{job['id']}").json()["status"] == "succeeded", "the job ends")
        until(lambda: len(receiver.requests) >= 3, "messages are sent, and refused")
        for secret in list(canaries.values()):
            call("POST", "/v1/webhook_endpoints", {"url": f"https://user:{secret}@hooks.example.com/"})
            call("POST", "/v1/webhook_endpoints", {"url": f"http://hooks.example.com/{secret}"})
            call(
                "POST", "/v1/webhook_endpoints", {"url": "https://hooks.example.com", "event_types": [secret]}
            )
            call("POST", "/v1/jobs", job_body(budget=secret))
            call("POST", "/v1/jobs", job_body(model={"id": f"./{secret}"}))
            call("GET", "/v1/jobs", params={"after": secret})
        refused = httpx2.get(f"{server.url}/v1/jobs", headers=bearer(canaries["an invalid key"]))
        errors.append(refused.text + str(refused.headers))
        call("DELETE", "/v1/webhook_endpoints/we_" + "0" * 26)
        shown = call("GET", f"/v1/webhook_endpoints/{hook['id']}").text
        shown += call("GET", f"/v1/webhook_endpoints/{hook['id']}/deliveries").text
        shown += (
            call("GET", "/v1/audit_events", params={"limit": 100}).text + call("GET", "/v1/api_keys").text
        )
        shown += call("GET", f"/v1/jobs/{job['id']}/events", params={"limit": 1000}).text
        rows = dump(url)
        if kind == "sqlite":
            with sqlite3.connect(data / "orthokv.db") as connection:
                rows += "\n".join(connection.iterdump())
        assert server.stop() == 0
        assert server.process.stdout is not None
        printed = server.process.stdout.read()
    log = (tmp_path / "data.log").read_text()
    assert "webhook.not_delivered" in log, "the log that is searched is the server's"
    assert len(errors) > 40
    assert hook["id"] in rows
    # A URL is no secret for those who manage the endpoint; it is for everybody who reads a log.
    in_rows = {name: value for name, value in canaries.items() if name != URL_TOKEN}
    places = {
        "log": (log + printed, canaries),
        "errors": ("\n".join(errors), canaries),
        "answers": (shown, in_rows),
        "database": (rows, in_rows),
        "files": (contents(data).decode("latin-1"), in_rows),
        "messages": (repr([(one.headers, one.body) for one in receiver.requests]), in_rows),
    }
    found = [
        (place, name)
        for place, (searched, secrets) in places.items()
        for name, secret in secrets.items()
        if secret in searched
    ]
    assert found == []


def _peppered_key(database: SyncDatabase, pepper: str) -> str:
    from app.principal import local_principal
    from app.projects import service
    from app.projects.schemas import ApiKeyCreate

    body = ApiKeyCreate(name="canary", scopes=list(Scope), project_id=DEFAULT_PROJECT_ID)
    return database.write(service.create_key, body=body, principal=local_principal(), pepper=pepper).key


def test_the_search_would_find_a_secret(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    upgrade(url)
    database = SyncDatabase(url)
    new_key(database, DEFAULT_PROJECT_ID)
    database.write(lambda session: session.execute(text("UPDATE api_key SET name = 'canary-in-a-row'")))
    database.close()
    assert "canary-in-a-row" in dump(url)
    assert b"canary-in-a-row" in contents(tmp_path)


def test_the_data_folder_keeps_its_own_key_for_its_owner_alone(tmp_path: Path) -> None:
    environment = {"ORTHOKV_OUTBOUND_PRIVATE_HOSTS": '["127.0.0.1"]', "ORTHOKV_WEBHOOK_POLL_SECONDS": "0.05"}
    with Receiver() as receiver, Server(tmp_path / "data", environment) as server:
        hook = server.post("/v1/webhook_endpoints", {"url": receiver.url, "event_types": ["job.created"]})
        file = server.data / "secret-key"
        assert file.stat().st_mode & 0o777 == 0o600
        made = file.read_text()
        assert Fernet(made)
        assert server.stop() == 0
        server.start()
        assert file.read_text() == made
        server.post("/v1/jobs", job_body(model={"id": "nobody/nothing"}))
        until(lambda: receiver.requests, "the message is sent")
        receiver.requests[0].verify(hook["secret"])
        assert made not in server.log()
