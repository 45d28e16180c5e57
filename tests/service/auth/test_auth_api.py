"""Projects, keys, audit events and the rate limit over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from app.auth.models import ApiKey
from app.auth.rate import RateLimit
from app.http.errors import Problem
from app.infra import keys
from app.infra.database import SyncDatabase, now
from app.infra.ids import new_id
from app.main import create_app
from app.principal import DEFAULT_PROJECT_ID, Scope
from app.settings import Settings
from tests.support.factories import job_body
from tests.support.tenants import ALL, OWNER, TENANT, bearer, new_key, new_project


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth_required": True})


@pytest.fixture
def admin(client: TestClient, database: SyncDatabase) -> TestClient:
    client.headers.update(bearer(new_key(database, DEFAULT_PROJECT_ID, ALL)))
    return client


def make_key(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/api_keys", json={"name": "k", "scopes": ["jobs:read"], **body})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


class TestKeyText:
    def test_a_key_names_its_row_and_hides_its_secret(self) -> None:
        key_id = new_id("key")
        text = keys.generate(key_id)
        assert keys.key_id_of(text) == key_id
        assert text.startswith(keys.prefix(key_id) + "_")
        assert keys.generate(key_id) != text
        assert keys.redact(f"a {text} b") == f"a {keys.prefix(key_id)}_[redacted] b"

    def test_any_changed_character_is_noticed(self) -> None:
        text = keys.generate(new_id("key"))
        for place in range(len(text)):
            other = text[:place] + ("b" if text[place] == "a" else "a") + text[place + 1 :]
            assert keys.key_id_of(other) is None, place

    def test_the_digest_depends_on_the_pepper(self) -> None:
        text = keys.generate(new_id("key"))
        assert keys.digest(text, "") != keys.digest(text, "pepper")


class TestKeys:
    def test_a_key_works_until_it_is_revoked(self, admin: TestClient) -> None:
        made = make_key(admin, scopes=["jobs:read", "jobs:write"])
        mine = bearer(made["key"])
        assert admin.get("/v1/jobs", headers=mine).status_code == 200
        for _ in range(2):  # repeating it is harmless
            revoked = admin.delete(f"/v1/api_keys/{made['id']}")
            assert revoked.status_code == 200
            assert revoked.json()["revoked_at"] is not None
        assert admin.get("/v1/jobs", headers=mine).status_code == 401
        assert admin.get(f"/v1/api_keys/{made['id']}").json() == revoked.json()

    def test_a_key_is_shown_once_and_stored_as_a_digest(
        self, admin: TestClient, database: SyncDatabase
    ) -> None:
        made = make_key(admin)
        shown = admin.get(f"/v1/api_keys/{made['id']}").json()
        assert {**shown, "key": made["key"], "last_used_at": None} == made
        assert made["key"].startswith(shown["prefix"])
        row = database.read(lambda session: session.get_one(ApiKey, made["id"]))
        assert row.digest == keys.digest(made["key"], "")

    def test_expiry(self, admin: TestClient, database: SyncDatabase) -> None:
        made = make_key(admin, expires_in_days=1.5)
        left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
        assert timedelta(days=1.49) < left < timedelta(days=1.51)
        assert admin.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200

    def test_the_last_use_is_noted_once_a_minute(self, admin: TestClient, database: SyncDatabase) -> None:
        made = make_key(admin)
        mine = bearer(made["key"])

        def last_use() -> str | None:
            value: str | None = admin.get(f"/v1/api_keys/{made['id']}").json()["last_used_at"]
            return value

        assert last_use() is None
        admin.get("/v1/jobs", headers=mine)
        first = last_use()
        assert first is not None
        admin.get("/v1/jobs", headers=mine)
        assert last_use() == first
        database.write(
            lambda session: session.execute(
                ApiKey.__table__.update().where(ApiKey.id == made["id"]).values(last_used_at=now(-61))
            )
        )
        admin.get("/v1/jobs", headers=mine)
        assert (last_use() or "") > first

    def test_the_pepper_is_part_of_the_check(self, settings: Settings, database: SyncDatabase) -> None:
        key = new_key(database, DEFAULT_PROJECT_ID)  # made without one
        other = settings.model_copy(update={"key_pepper": type(settings.key_pepper)("x")})
        with TestClient(create_app(other)) as client:
            assert client.get("/v1/jobs", headers=bearer(key)).status_code == 401
        with TestClient(create_app(settings)) as client:
            assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200

    def test_a_manager_gives_no_more_than_it_has(self, client: TestClient, database: SyncDatabase) -> None:
        project = new_project(database, "tenant")
        manager = (Scope.KEYS_MANAGE, Scope.JOBS_READ)
        client.headers.update(bearer(new_key(database, project, manager)))
        assert make_key(client, scopes=["jobs:read"])["project_id"] == project
        for scope in ("jobs:write", "admin"):
            refused = client.post("/v1/api_keys", json={"name": "k", "scopes": [scope]})
            assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")
        elsewhere = {"name": "k", "scopes": ["jobs:read"], "project_id": DEFAULT_PROJECT_ID}
        assert client.post("/v1/api_keys", json=elsewhere).status_code == 404

    def test_an_admin_makes_keys_of_every_project(self, admin: TestClient) -> None:
        project = admin.post("/v1/projects", json={"name": "tenant"}).json()["id"]
        made = make_key(admin, project_id=project, scopes=["keys:manage"])
        listed = admin.get("/v1/api_keys", headers=bearer(made["key"])).json()["data"]
        assert [one["id"] for one in listed] == [made["id"]]
        assert made["id"] in [one["id"] for one in admin.get("/v1/api_keys").json()["data"]]
        nowhere = {"name": "k", "scopes": ["jobs:read"], "project_id": "proj_" + "1" * 26}
        assert admin.post("/v1/api_keys", json=nowhere).status_code == 404


def test_beside_the_owners_token_a_sent_key_still_counts(settings: Settings, database: SyncDatabase) -> None:
    owned = settings.model_copy(update={"auth_required": False})
    with TestClient(create_app(owned), headers=OWNER) as client:
        local = client.post("/v1/jobs", json=job_body()).json()["id"]
        tenant = bearer(new_key(database, new_project(database, "tenant")))
        assert client.get(f"/v1/jobs/{local}").status_code == 200
        assert client.get(f"/v1/jobs/{local}", headers=tenant).status_code == 404
        assert client.get("/v1/jobs", headers=bearer("okv_garbage")).status_code == 401


def test_a_stream_ends_and_its_successor_needs_a_key(settings: Settings, database: SyncDatabase) -> None:
    key = new_key(database, DEFAULT_PROJECT_ID)
    short = settings.model_copy(update={"max_stream_seconds": 0.1})
    with TestClient(create_app(short)) as client:
        job_id = client.post("/v1/jobs", json=job_body(), headers=bearer(key)).json()["id"]
        wanted = {"Accept": "text/event-stream"}
        path = f"/v1/jobs/{job_id}/events"
        seen = client.get(path, headers={**wanted, **bearer(key)})  # ends, though the job has not
        assert "event: job.created" in seen.text
        client.delete(f"/v1/api_keys/key_{key.split('_')[1]}", headers=bearer(key))
        assert client.get(path, headers={**wanted, **bearer(key)}).status_code == 401


class TestProjects:
    def test_create_read_and_limit(self, admin: TestClient) -> None:
        made = admin.post("/v1/projects", json={"name": "search", "limits": {"queued_jobs": 3}})
        assert made.status_code == 201
        path = made.headers["location"]
        assert admin.get(path).json() == made.json()
        assert made.json()["limits"]["stored_bytes"] is None
        changed = admin.patch(path, json={"limits": {"stored_bytes": 10}}).json()["limits"]
        assert (changed["queued_jobs"], changed["stored_bytes"]) == (None, 10)
        assert [one["name"] for one in admin.get("/v1/projects").json()["data"]] == ["search", "default"]

    def test_names_are_unique(self, admin: TestClient) -> None:
        refused = admin.post("/v1/projects", json={"name": "default"})
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


class TestAudit:
    def test_who_did_what_by_which_request(self, client: TestClient, database: SyncDatabase) -> None:
        key = new_key(database, DEFAULT_PROJECT_ID, ALL)
        client.headers.update(bearer(key))
        done = client.post("/v1/jobs", json=job_body())
        client.post(f"/v1/jobs/{done.json()['id']}/cancel")
        events = client.get("/v1/audit_events").json()["data"]
        assert [event["action"] for event in events[:2]] == ["job.cancelled", "job.created"]
        assert events[1]["subject_id"] == done.json()["id"]
        assert events[1]["actor"] == f"key_{key.split('_')[1]}"
        assert events[1]["request_id"] == done.headers["x-request-id"]
        assert events[1]["project_id"] == DEFAULT_PROJECT_ID

    def test_filters_and_pages(self, admin: TestClient) -> None:
        project = admin.post("/v1/projects", json={"name": "tenant"}).json()["id"]
        for _ in range(3):
            make_key(admin, project_id=project)
        query = {"project_id": project, "action": "api_key.created", "limit": 2}
        first = admin.get("/v1/audit_events", params=query).json()
        rest = admin.get("/v1/audit_events", params={**query, "after": first["last_id"]}).json()
        assert (len(first["data"]), len(rest["data"]), rest["has_more"]) == (2, 1, False)

    def test_a_refused_act_leaves_no_event(self, admin: TestClient) -> None:
        before = admin.get("/v1/audit_events").json()["data"]
        assert admin.post("/v1/projects", json={"name": "default"}).status_code == 409
        assert admin.get("/v1/audit_events").json()["data"] == before

    @pytest.mark.parametrize("statement", ["UPDATE audit_event SET actor = 'x'", "DELETE FROM audit_event"])
    def test_the_database_refuses_to_change_one(
        self, admin: TestClient, database: SyncDatabase, statement: str
    ) -> None:
        make_key(admin)
        with pytest.raises(DatabaseError, match="audit_event is append-only"):
            database.write(lambda session: session.execute(text(statement)))


class TestRateLimit:
    def test_the_bucket_empties_and_refills(self) -> None:
        moment = 0.0
        limit = RateLimit(3, 30.0, clock=lambda: moment)
        for _ in range(3):
            limit.take("a")
        limit.take("b")  # another key has a bucket of its own
        with pytest.raises(Problem) as refused:
            limit.take("a")
        assert refused.value.headers["Retry-After"] == "10"
        moment = 9.9
        with pytest.raises(Problem):
            limit.take("a")
        moment = 10.0
        limit.take("a")
        moment = 1000.0  # never more than a full bucket
        for _ in range(3):
            limit.take("a")
        with pytest.raises(Problem):
            limit.take("a")

    def test_too_many_requests_are_429(self, settings: Settings, database: SyncDatabase) -> None:
        slow = settings.model_copy(update={"rate_limit_requests": 2, "rate_limit_window_seconds": 3600.0})
        headers = bearer(new_key(database, DEFAULT_PROJECT_ID, (Scope.JOBS_READ,)))
        with TestClient(create_app(slow)) as client:
            assert client.get("/v1/jobs", headers=headers).status_code == 200
            assert client.get("/v1/datasets", headers=headers).status_code == 403  # refusals count
            refused = client.get("/v1/jobs", headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
            assert refused.json()["detail"].startswith(
                "This key may send 2 requests in 3600 s; come back in "
            )
            assert 1700 < int(refused.headers["retry-after"]) <= 1800
            assert refused.headers["ratelimit-policy"] == '"default";q=2;w=3600'
            other = bearer(new_key(database, DEFAULT_PROJECT_ID, TENANT))
            assert client.get("/v1/jobs", headers=other).status_code == 200
