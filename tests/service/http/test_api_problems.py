"""Every failure is a problem with a code, and tells nothing that the client did not say in the clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.http.errors import Code, ProblemDetail
from app.infra.database import SyncDatabase
from app.main import create_app
from app.settings import Settings
from tests.service.conftest import copy_of
from tests.support.factories import job_body
from tests.support.paths import REPOSITORY
from tools.openapi import main as openapi_main

CANARY = "hunter2-secret"


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """One database will do: nothing here depends on its kind."""
    return copy_of(sqlite_template, tmp_path)


def problem_of(response: Any, status: int, code: Code) -> ProblemDetail:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = ProblemDetail.model_validate(response.json())
    assert (problem.status, problem.code) == (status, code)
    assert response.headers["x-request-id"] == problem.request_id
    return problem


def test_unknown_paths_and_methods(client: TestClient) -> None:
    problem_of(client.get("/nothing"), 404, Code.NOT_FOUND)
    problem_of(client.get("/v1/jobs/"), 404, Code.NOT_FOUND)
    refused = client.delete("/v1/jobs")
    problem_of(refused, 405, Code.METHOD_NOT_ALLOWED)
    assert refused.headers["allow"] == "GET, POST"  # of two routes


def test_malformed_ids_do_not_reach_the_database(client: TestClient) -> None:
    for path in ("jobs/1", "artifacts/../../etc/passwd", "datasets/ds_UPPER", "profiles/prof_%00"):
        assert client.get(f"/v1/{path}").status_code in (404, 422)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_413(client: TestClient, settings: Settings, declared: bool) -> None:
    body = b'{"a": "' + b"x" * settings.max_body_bytes + b'"}'
    content = body if declared else iter([body[:1000], body[1000:]])
    response = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    problem_of(response, 413, Code.BODY_TOO_LARGE)


def test_json_that_is_none(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/jobs", content=f'{{"model": {CANARY}', headers=headers)
    problem_of(response, 422, Code.INVALID_REQUEST)
    assert CANARY not in response.text


def test_a_body_of_another_type_is_not_read_as_json(client: TestClient) -> None:
    """A page of another site can send text/plain without asking first."""
    response = client.post("/v1/jobs", content=json.dumps(job_body()), headers={"Content-Type": "text/plain"})
    problem_of(response, 415, Code.UNSUPPORTED_MEDIA_TYPE)


@pytest.mark.parametrize("text", ["\0", "\ud800"])
def test_characters_that_are_no_text_are_refused_by_name(client: TestClient, text: str) -> None:
    """Postgres would refuse them late, SQLite not at all."""
    for change in ({"metadata": {"a": text}}, {"model": {"id": f"org/{text}"}}):
        # Escaped in the JSON, where every JSON parser lets them through.
        body, headers = json.dumps(job_body(**change)), {"Content-Type": "application/json"}
        response = client.post("/v1/jobs", content=body, headers=headers)
        problem = problem_of(response, 422, Code.INVALID_REQUEST)
        assert problem.errors[0].pointer.startswith(f"/{next(iter(change))}")
    named = json.dumps({"filename": f"{text}.jsonl"})
    problem_of(client.post("/v1/datasets", content=named, headers=headers), 422, Code.INVALID_REQUEST)
    problem_of(client.get("/v1/jobs?model=a%00b"), 422, Code.INVALID_REQUEST)


@pytest.mark.parametrize("number", [2**31, 10**22])
def test_event_numbers_beyond_any_are_refused(client: TestClient, number: int) -> None:
    path = f"/v1/jobs/job_{'0' * 26}/events"
    problem_of(client.get(f"{path}?after={number}"), 422, Code.INVALID_REQUEST)
    problem_of(client.get(path, headers={"Last-Event-ID": str(number)}), 422, Code.INVALID_REQUEST)


def test_json_that_cannot_be_read_has_no_place_in_the_document(client: TestClient) -> None:
    response = client.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert problem_of(response, 422, Code.INVALID_REQUEST).errors[0].pointer == ""


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"id": ["hunter2-secret"]}},
        {"model": {"id": "org/x", "revision": {"token": "hunter2-secret"}}},
        {"budget": {"metric": "hunter2-secret", "value": "hunter2-secret"}},
        {"dataset": {"source": "hunter2-secret"}},
        {"dataset": {"id": "ds_hunter2-secret"}},
        {"method": {"type": "hunter2-secret"}},
        {"seed": "hunter2-secret"},
        {"model": {"id": "./hunter2-secret"}},
    ],
    ids=str,
)
def test_no_problem_repeats_a_value(client: TestClient, change: dict[str, Any]) -> None:
    response = client.post("/v1/jobs", json=job_body(**change))
    problem_of(response, 422, Code.INVALID_REQUEST)
    assert CANARY not in response.text


def test_a_defect_is_500_without_its_message(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.jobs import repository

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(repository, "list_jobs", broken)
    response = client.get("/v1/jobs")
    problem_of(response, 500, Code.INTERNAL)
    assert CANARY not in response.text


def test_a_database_that_fails_is_503(client: TestClient, database: SyncDatabase) -> None:
    def drop(session: Session) -> None:
        session.execute(text("DROP TABLE alembic_version"))
        session.execute(text("ALTER TABLE job RENAME TO gone"))

    database.write(drop)
    problem_of(client.get("/readyz"), 503, Code.UNAVAILABLE)
    problem_of(client.get("/v1/jobs"), 503, Code.UNAVAILABLE)
    assert client.get("/livez").json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["testserver", "testserver:8000", "TestServer"])
def test_our_host_name_is_taken_with_any_port(client: TestClient, host: str) -> None:
    assert client.get("/livez", headers={"Host": host}).status_code == 200


def test_other_sites_cannot_post(client: TestClient) -> None:
    path = f"/v1/jobs/job_{'0' * 26}/cancel"
    for origin in ("https://evil.example", "null"):
        problem_of(client.post(path, headers={"Origin": origin}), 403, Code.FOREIGN_ORIGIN)
    problem_of(client.post(path, headers={"Origin": "http://testserver:8000"}), 404, Code.NOT_FOUND)


def test_probes_and_request_ids(client: TestClient) -> None:
    assert client.get("/readyz").json() == {"status": "ok"}


def test_a_server_whose_store_is_gone_is_not_ready(client: TestClient, settings: Settings) -> None:
    (settings.data_dir / "objects").rename(settings.data_dir / "elsewhere")
    problem_of(client.get("/readyz"), 503, Code.UNAVAILABLE)
    ids = {client.get("/livez").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


class TestOpenApi:
    def test_the_committed_document_is_that_of_the_routes(self) -> None:
        assert openapi_main(["--check", str(REPOSITORY / "openapi.json")]) == 0

    def test_a_difference_is_found(self, tmp_path: Path) -> None:
        file = tmp_path / "openapi.json"
        assert openapi_main(["--check", str(file)]) == 1
        assert openapi_main([str(file)]) == 0
        assert openapi_main(["--check", str(file)]) == 0
        file.write_text(file.read_text().replace("jobs.create", "jobs.make"))
        assert openapi_main(["--check", str(file)]) == 1

    def test_every_operation_is_named_by_hand_and_documents_its_problems(self, settings: Settings) -> None:
        document = create_app(settings).openapi()
        assert document["openapi"].startswith("3.1")
        operations = [one for path in document["paths"].values() for one in path.values()]
        names = [operation["operationId"] for operation in operations]
        assert all("." in name for name in names)
        assert len(set(names)) == len(names)
        for operation in operations:
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"]
            assert {"400", "422", "500", "503"} <= set(operation["responses"])
        assert "HTTPValidationError" not in document["components"]["schemas"]

    def test_every_reference_leads_somewhere(self, settings: Settings) -> None:
        text = json.dumps(create_app(settings).openapi())
        document = json.loads(text)
        names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
        assert names <= set(document["components"]["schemas"])
