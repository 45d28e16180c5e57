"""Every route, asked by everybody who must not get in: 401, 403 and 404, and nothing else.

The routes are read from the application and the paths with ids from its OpenAPI document, so a route that is
added without a principal fails here.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.http.errors import PROBLEM_JSON
from app.infra.database import SyncDatabase
from app.infra.ids import new_id
from app.infra.keys import generate
from app.infra.storage import Storage
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.principal import DEFAULT_PROJECT_ID, Scope
from app.settings import Settings
from tests.support.factories import advance, finish, job_body
from tests.support.tenants import (
    ALL,
    PUBLIC,
    TENANT,
    Operation,
    bearer,
    expired_key,
    new_key,
    new_project,
    operations,
    revoked_key,
)

IDS = {
    "job_id": "job",
    "dataset_id": "ds",
    "profile_id": "prof",
    "checkpoint_id": "ckpt",
    "artifact_id": "art",
    "key_id": "key",
    "project_id": "proj",
    "endpoint_id": "we",
    "delivery_id": "msg",
}
TEXT = b"calibration text"
BUDGET = {"metric": "kept", "value": 0.5}
BODIES: dict[str, dict[str, Any]] = {
    "datasets.complete": {"sha256": hashlib.sha256(TEXT).hexdigest()},
    "profiles.create_checkpoint": {"budget": BUDGET},
    "projects.update": {"limits": {}},
    "webhook_endpoints.update": {"description": "changed"},
    "webhook_endpoints.rotate_secret": {},
}
"""Valid bodies of the operations that have an id in their path and take a JSON body."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"auth_required": True, "secret_keys": SecretStr(Fernet.generate_key().decode())}
    )


def path_of(operation: Operation) -> str:
    """The path with ids that are well-formed and of nothing."""
    return re.sub(r"\{(\w+)\}", lambda match: f"{IDS[match[1]]}_{'0' * 26}", operation.path)


def call(client: TestClient, operation: Operation, headers: dict[str, str]) -> Any:
    return client.request(operation.method, path_of(operation), headers=headers)


def let_in(client: TestClient, api: FastAPI, headers: dict[str, str]) -> list[str]:
    """Routes, but the public ones, that answer anything else than a proper 401."""
    found: list[str] = []
    for operation in operations(api):
        if operation.path in PUBLIC:
            continue
        response = call(client, operation, headers)
        proper = response.status_code == 401 and response.headers["content-type"] == PROBLEM_JSON
        if not proper or not response.headers.get("www-authenticate", "").startswith("Bearer "):
            found.append(f"{operation}: {response.status_code}")
    return found


def wrong_credentials(database: SyncDatabase) -> dict[str, dict[str, str]]:
    known = new_key(database, DEFAULT_PROJECT_ID, ALL)
    key_id = f"key_{known.split('_')[1]}"
    return {
        "none": {},
        "empty": {"Authorization": ""},
        "another scheme": {"Authorization": "Basic " + "dXNlcjpwYXNzd29yZA=="},
        "garbage": bearer("okv_garbage"),
        "a key that never was": bearer(generate(new_id("key"))),
        "a known id with another secret": bearer(generate(key_id)),
        "a wrong checksum": bearer(known[:-1] + ("a" if known[-1] != "a" else "b")),
        "too long": bearer(known + "0" * 10_000),
        "expired": bearer(expired_key(database, DEFAULT_PROJECT_ID)),
        "revoked": bearer(revoked_key(database, DEFAULT_PROJECT_ID)),
    }


def test_nobody_gets_in_without_a_valid_key(client: TestClient, database: SyncDatabase) -> None:
    api = client.app
    assert isinstance(api, FastAPI)
    for name, headers in wrong_credentials(database).items():
        assert let_in(client, api, headers) == [], name


def test_the_walk_finds_a_route_without_a_principal(settings: Settings) -> None:
    api = create_app(settings)
    api.add_api_route("/v1/forgotten/{job_id}", lambda job_id: job_id, methods=["GET"])
    with TestClient(api) as client:
        assert let_in(client, api, {}) == ["GET /v1/forgotten/{job_id}: 200"]


def test_public_routes_are_few_and_exist(client: TestClient) -> None:
    api = client.app
    assert isinstance(api, FastAPI)
    assert {operation.path for operation in operations(api)} >= PUBLIC
    for path in PUBLIC:
        assert client.get(path).status_code == 200, path


def documented_scope(api: FastAPI, operation: Operation) -> Scope:
    (requirement,) = api.openapi()["paths"][operation.path][operation.method.lower()]["security"]
    (scope,) = requirement["apiKey"]
    return Scope(scope)


def test_too_small_a_scope_is_403(client: TestClient, database: SyncDatabase) -> None:
    """Each route is asked with every scope but the one that its documentation names."""
    api = client.app
    assert isinstance(api, FastAPI)
    keys = {scope: new_key(database, DEFAULT_PROJECT_ID, _without(scope)) for scope in Scope}
    for operation in operations(api):
        if operation.path in PUBLIC:
            continue
        scope = documented_scope(api, operation)
        response = call(client, operation, bearer(keys[scope]))
        assert response.status_code == 403, operation
        assert f'scope="{scope}"' in response.headers["www-authenticate"]
        if operation.method != "HEAD":
            assert response.json()["code"] == "insufficient_scope"


def _without(scope: Scope) -> tuple[Scope, ...]:
    return tuple(other for other in TENANT if other is not scope)


def test_the_documented_scope_is_enough(client: TestClient, database: SyncDatabase) -> None:
    api = client.app
    assert isinstance(api, FastAPI)
    keys = {scope: new_key(database, DEFAULT_PROJECT_ID, (scope,)) for scope in Scope}
    for operation in operations(api):
        if operation.path not in PUBLIC:
            response = call(client, operation, bearer(keys[documented_scope(api, operation)]))
            assert response.status_code not in (401, 403), operation


@pytest.fixture
def theirs(
    client: TestClient, database: SyncDatabase, storage: Storage, tmp_path: Path
) -> tuple[dict[str, str], str]:
    """One of everything, made by tenant A: ids by the name of the path's parameter; and a key of A."""
    project_id = new_project(database, "tenant-a")
    key = new_key(database, project_id, ALL)
    client.headers.update(bearer(key))
    dataset = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    client.put(dataset["upload"]["url"], content=TEXT)
    client.post(f"/v1/datasets/{dataset['id']}/complete", json=BODIES["datasets.complete"])
    hook = client.post("/v1/webhook_endpoints", json={"url": "https://hooks.example.com/"}).json()
    job = client.post("/v1/jobs", json=job_body(dataset={"id": dataset["id"]})).json()
    finish(database, advance(database, job["id"], StepName.EVALUATE))
    result = client.get(f"/v1/jobs/{job['id']}").json()["result"]
    profile = client.get(f"/v1/profiles/{result['profile_id']}").json()
    artifact_id = profile["files"]["json"]["id"]
    content = tmp_path / "content"
    content.write_bytes(b"abc")
    for file in profile["files"].values():
        key_of = database.read(_object_key, file["id"])
        storage.put_file(key_of, content)
    messages = client.get(f"/v1/webhook_endpoints/{hook['id']}/deliveries").json()["data"]
    del client.headers["Authorization"]
    ids = {
        "job_id": job["id"],
        "dataset_id": dataset["id"],
        "profile_id": result["profile_id"],
        "checkpoint_id": result["checkpoint_id"],
        "artifact_id": artifact_id,
        "key_id": f"key_{key.split('_')[1]}",
        "project_id": project_id,
        "endpoint_id": hook["id"],
        "delivery_id": messages[0]["id"],
    }
    return ids, key


def _object_key(session: Any, artifact_id: str) -> str:
    from app.artifacts.models import Artifact

    key: str = session.get_one(Artifact, artifact_id).object_key
    return key


def id_operations(api: FastAPI) -> list[tuple[str, str, str, list[str], bool]]:
    """(operation id, method, path, id parameters, takes JSON) of every path with an id, from the document."""
    found = []
    for path, methods in api.openapi()["paths"].items():
        for method, operation in methods.items():
            if parameters := re.findall(r"\{(\w+)\}", path):
                takes_json = "application/json" in operation.get("requestBody", {}).get("content", {})
                found.append((operation["operationId"], method, path, parameters, takes_json))
    return found


def ask(client: TestClient, one: tuple[str, str, str, list[str], bool], ids: dict[str, str], key: str) -> int:
    name, method, path, parameters, takes_json = one
    for parameter in parameters:
        path = path.replace(f"{{{parameter}}}", ids[parameter])
    body = {"json": BODIES[name]} if takes_json else {}
    return client.request(method, path, headers=bearer(key), **body).status_code


def test_the_matrix_of_tenants(
    client: TestClient, database: SyncDatabase, theirs: tuple[dict[str, str], str]
) -> None:
    """Whatever A made is not there for B: neither for a key with every scope of a tenant, nor for an admin's
    own data routes."""
    ids, their_key = theirs
    api = client.app
    assert isinstance(api, FastAPI)
    project_b = new_project(database, "tenant-b")
    tenant, admin = new_key(database, project_b), new_key(database, project_b, ALL)
    matrix = id_operations(api)
    assert len(matrix) >= 15
    admins_own = {"projects.get", "projects.update", "api_keys.get", "api_keys.revoke"}
    for one in matrix:
        expected = 403 if one[0].startswith("projects.") else 404
        assert ask(client, one, ids, tenant) == expected, one
        if one[0] not in admins_own:
            assert ask(client, one, ids, admin) == 404, one
    # The same requests by A, so that 404 above was the tenant's doing. Deletions come last, the job's after those of
    # what it made and after the end of the job that was asked for here; then A's key is revoked.
    last = ("artifacts", "profiles", "checkpoints", "datasets", "jobs", "webhook_endpoints")
    order = [f"{name}.delete" for name in last] + ["api_keys.revoke"]
    for one in sorted(matrix, key=lambda one: order.index(one[0]) if one[0] in order else -1):
        assert ask(client, one, ids, their_key) in (200, 202, 204, 409), one


def test_ids_in_bodies_queries_and_cursors_are_guarded_as_those_in_paths(
    client: TestClient, database: SyncDatabase, theirs: tuple[dict[str, str], str]
) -> None:
    ids, _ = theirs
    their_key = new_key(database, ids["project_id"])
    headers = bearer(new_key(database, new_project(database, "tenant-b")))
    foreign = job_body(dataset={"id": ids["dataset_id"]})
    assert client.post("/v1/jobs", json=foreign, headers=headers).status_code == 404
    mixed = job_body(dataset={"source": "self", "num_samples": 4, "also": [{"id": ids["dataset_id"]}]})
    assert client.post("/v1/jobs", json=mixed, headers=headers).status_code == 404
    query = {"profile_id": ids["profile_id"]}
    assert client.get("/v1/checkpoints", params=query, headers=headers).json()["data"] == []
    for resource in ("jobs", "datasets", "profiles", "checkpoints", "api_keys", "webhook_endpoints"):
        mine = client.get(f"/v1/{resource}", headers=bearer(their_key)).json()["data"]
        listed = client.get(f"/v1/{resource}", headers=headers).json()["data"]
        assert {one["id"] for one in mine}.isdisjoint(one["id"] for one in listed)
        assert mine, resource
        refused = client.get(f"/v1/{resource}", params={"after": mine[0]["id"]}, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor")


def test_an_idempotency_key_is_of_its_project(client: TestClient, database: SyncDatabase) -> None:
    keys = [new_key(database, new_project(database, name)) for name in ("tenant-a", "tenant-b")]
    made = [
        client.post("/v1/jobs", json=job_body(), headers={**bearer(key), "Idempotency-Key": "same"})
        for key in (*keys, keys[0])
    ]
    assert [response.status_code for response in made] == [201, 201, 201]
    first, second, again = (response.json()["id"] for response in made)
    assert first == again != second


def test_what_serves_clients_asks_for_rows_of_a_project_only() -> None:
    """Statements over rows of any project are for workers: no route and no service of a resource uses one."""
    unscoped = re.compile(
        r"repository\.(get_job|lock_job|get_version|get_dataset|get_profile)\b|session\.get\(|\bselect\("
    )
    files = [file for name in ("routes", "service") for file in Path("app").glob(f"*/{name}.py")]
    assert len(files) > 12
    assert [str(file) for file in files if unscoped.search(file.read_text())] == []
    assert unscoped.search(Path("workers/orders.py").read_text())  # it would be found


def test_every_guarded_operation_documents_its_refusals(settings: Settings) -> None:
    document = create_app(settings).openapi()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path not in PUBLIC:
                assert {"401", "403", "429"} <= set(operation["responses"]), operation["operationId"]
                assert operation["security"], operation["operationId"]
            else:
                assert "security" not in operation


def test_every_route_has_a_bound_on_its_body(settings: Settings) -> None:
    from app.http.routing import BoundedRoute

    unbounded = {
        context.original_route.operation_id
        for context in iter_route_contexts(create_app(settings).routes)
        if isinstance(context.original_route, APIRoute)
        and (context.methods or set()) & {"POST", "PUT", "PATCH"}
        and not isinstance(context.original_route, BoundedRoute)
    }
    assert unbounded == {"datasets.upload"}
