"""Jobs over HTTP."""

from __future__ import annotations

import re
import threading
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from app.infra.database import SyncDatabase
from app.jobs import service
from app.jobs.lease import Failure, fail
from app.jobs.schemas import Method
from app.jobs.vocabulary import JobErrorCode, StepName
from app.principal import local_principal
from orthokv.spec.methods import METHODS
from tests.support.factories import (
    POLICY,
    advance,
    complete,
    job_body,
    must_claim,
    put_layer,
    queue_job,
)


def post_job(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=job_body(**changes))
    assert response.status_code == 201, response.text
    body: dict[str, Any] = response.json()
    return body


class TestCreate:
    def test_a_job_is_queued_with_its_defaults(self, client: TestClient) -> None:
        response = client.post(
            "/v1/jobs",
            json={
                "model": {"id": "org/model"},
                "dataset": {"source": "self"},
                "budget": {"metric": "kept", "value": 0.25},
            },
        )
        job = response.json()
        assert response.status_code == 201
        assert response.headers["location"] == f"/v1/jobs/{job['id']}"
        assert re.fullmatch(r"job_[0-9a-hjkmnp-tv-z]{26}", job["id"])
        assert (job["status"], job["phase"], job["kind"]) == ("queued", "resolving", "compress")
        assert job["spec"]["method"] == {
            "type": "oblique",
            "sharing": "joint",
            "key_mode": "pre",
            "positions": None,
            "parameterisation": "direct",
            "steps": None,
            "refine_steps": None,
        }
        assert (job["spec"]["dataset"]["num_samples"], job["spec"]["dataset"]["sequence_length"]) == (
            64,
            1024,
        )
        assert [step["name"] for step in job["steps"]] == [
            "resolve",
            "calibrate",
            "profile",
            "package",
            "evaluate",
        ]

    @pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
    @pytest.mark.parametrize("sharing", ["pair", "quad", "auto"])
    def test_heads_can_share_in_groups(self, client: TestClient, sharing: str) -> None:
        job = post_job(client, method={"sharing": sharing})
        assert job["spec"]["method"]["sharing"] == sharing

    @pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
    @pytest.mark.parametrize(
        ("change", "pointer"),
        [
            ({"budget": {"metric": "kept", "value": 0}}, "/budget/value"),
            ({"budget": {"metric": "kept", "value": 1.01}}, "/budget"),
            ({"budget": {"metric": "layer_error", "value": -1}}, "/budget/value"),
            ({"budget": {"metric": "speed", "value": 1}}, "/budget/metric"),
            ({"dataset": {"source": "self", "id": "ds_" + "0" * 26}}, "/dataset"),
            ({"dataset": {}}, "/dataset"),
            ({"dataset": {"source": "self", "num_samples": 0}}, "/dataset/num_samples"),
            ({"dataset": {"source": "self", "also": [{"source": "self"}]}}, "/dataset"),
            ({"dataset": {"source": "self", "also": [{}]}}, "/dataset/also/0"),
            (
                {"dataset": {"source": "self", "num_samples": 1, "also": [{"id": "ds_" + "0" * 26}]}},
                "/dataset",
            ),
            ({"dataset": {"source": "/etc/passwd"}}, "/dataset/source"),
            ({"method": {"type": "magic"}}, "/method/type"),
            ({"method": {"rank": 3}}, "/method/rank"),
            ({"method": {"positions": 64}}, "/method"),
            ({"method": {"key_mode": "post", "positions": 1}}, "/method/positions"),
            ({"form": "zip"}, "/form"),
            ({"rank_multiple": 0}, "/rank_multiple"),
            ({"polish_steps": -1}, "/polish_steps"),
            ({"polish_steps": 1, "budget": {"metric": "layer_error", "value": 0.1}}, ""),
            ({"seed": -1}, "/seed"),
            ({"surprise": 1}, "/surprise"),
            ({"model": {"id": ""}}, "/model/id"),
            ({"model": {"id": "../../etc"}}, "/model/id"),
            ({"metadata": {"bad key": "x"}}, "/metadata/bad key/[key]"),
            ({"metadata": {f"k{n}": "x" for n in range(17)}}, "/metadata"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_input_names_the_field(
        self, client: TestClient, change: dict[str, Any], pointer: str
    ) -> None:
        response = client.post("/v1/jobs", json=job_body(**change))
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "invalid_request"
        assert pointer in [field["pointer"] for field in response.json()["errors"]]
        assert client.get("/v1/jobs").json()["data"] == []

    @pytest.mark.parametrize("value", [1.0, 0.0001])
    def test_the_ends_of_kept_are_accepted(self, client: TestClient, value: float) -> None:
        assert post_job(client, budget={"metric": "kept", "value": value})["status"] == "queued"

    def test_a_dataset_has_to_exist_and_be_ready(self, client: TestClient) -> None:
        unknown = {"id": "ds_" + "0" * 26}
        assert client.post("/v1/jobs", json=job_body(dataset=unknown)).status_code == 404
        made = client.post("/v1/datasets", json={"filename": "a.jsonl"}).json()
        response = client.post("/v1/jobs", json=job_body(dataset={"id": made["id"]}))
        assert (response.status_code, response.json()["code"]) == (409, "dataset_not_ready")


class TestIdempotency:
    def test_a_repetition_gets_the_first_answer(self, client: TestClient, database: SyncDatabase) -> None:
        headers = {"Idempotency-Key": "order-66"}
        first = client.post("/v1/jobs", json=job_body(), headers=headers)
        must_claim(database)  # the job has moved on; the answer has not
        again = client.post("/v1/jobs", json=job_body(), headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
        assert "idempotent-replayed" not in first.headers
        assert len(client.get("/v1/jobs").json()["data"]) == 1

    def test_another_body_is_another_request(self, client: TestClient) -> None:
        headers = {"Idempotency-Key": "k"}
        client.post("/v1/jobs", json=job_body(), headers=headers)
        response = client.post("/v1/jobs", json=job_body(seed=1), headers=headers)
        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")

    def test_a_refused_request_does_not_use_up_the_key(self, client: TestClient) -> None:
        headers = {"Idempotency-Key": "k"}
        unknown = job_body(dataset={"id": "ds_" + "0" * 26})
        assert client.post("/v1/jobs", json=unknown, headers=headers).status_code == 404
        assert client.post("/v1/jobs", json=job_body(), headers=headers).status_code == 201

    @pytest.mark.parametrize("key", ["", "with space", "x" * 256])
    def test_a_malformed_key_is_refused(self, client: TestClient, key: str) -> None:
        response = client.post("/v1/jobs", json=job_body(), headers={"Idempotency-Key": key})
        assert (response.status_code, response.json()["code"]) == (400, "invalid_idempotency_key")

    def test_many_at_once_make_one_job(self, client: TestClient) -> None:
        ids: list[str] = []

        def post() -> None:
            response = client.post("/v1/jobs", json=job_body(), headers={"Idempotency-Key": "same"})
            ids.append(response.json()["id"])

        threads = [threading.Thread(target=post) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 8
        assert len(set(ids)) == 1


class TestRead:
    def test_the_etag_follows_the_version(self, client: TestClient, database: SyncDatabase) -> None:
        job = post_job(client)
        first = client.get(f"/v1/jobs/{job['id']}")
        etag = first.headers["etag"]
        assert first.headers["retry-after"] == "2"
        assert client.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": etag}).status_code == 304
        must_claim(database)
        changed = client.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": etag})
        assert changed.status_code == 200
        assert changed.headers["etag"] != etag

    def test_a_wait_ends_with_the_next_change(self, client: TestClient, database: SyncDatabase) -> None:
        job = post_job(client)
        timer = threading.Timer(0.2, must_claim, [database])
        timer.start()
        query = {"wait": 30, "if_version": job["version"]}
        answer = client.get(f"/v1/jobs/{job['id']}", params=query).json()
        timer.join()
        assert answer["status"] == "running"
        assert answer["version"] > job["version"]

    def test_a_wait_for_a_version_long_gone_ends_at_once(self, client: TestClient) -> None:
        job = post_job(client)
        assert client.get(f"/v1/jobs/{job['id']}", params={"wait": 60, "if_version": 0}).status_code == 200

    def test_a_wait_for_a_job_that_ended_ends_at_once(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job = post_job(client)
        client.post(f"/v1/jobs/{job['id']}/cancel")
        response = client.get(f"/v1/jobs/{job['id']}", params={"wait": 60})
        assert response.json()["status"] == "cancelled"
        assert "retry-after" not in response.headers

    def test_layers_show_as_they_are_committed(self, client: TestClient, database: SyncDatabase) -> None:
        job = post_job(client)
        lease = advance(database, job["id"], StepName.FIT)
        put_layer(database, lease, 1)
        layers = client.get(f"/v1/jobs/{job['id']}/layers").json()["data"]
        assert [(layer["layer"], layer["metrics"]) for layer in layers] == [(1, {"error": 0.5})]
        progress = client.get(f"/v1/jobs/{job['id']}").json()["progress"]
        assert progress == {"done": 1, "total": 3, "unit": "layer", "fraction": pytest.approx(1 / 3)}

    def test_a_job_that_is_not_there_is_404(self, client: TestClient) -> None:
        nobody = "job_" + "0" * 26
        for path in ("", "/events", "/layers"):
            response = client.get(f"/v1/jobs/{nobody}{path}")
            assert (response.status_code, response.json()["code"]) == (404, "not_found")
        for action in ("cancel", "retry"):
            assert client.post(f"/v1/jobs/{nobody}/{action}").status_code == 404


class TestList:
    def test_filters_combine(self, client: TestClient, database: SyncDatabase) -> None:
        a = post_job(client, metadata={"team": "x", "run.id": "1"})["id"]
        post_job(client, metadata={"team": "y"})
        b = post_job(client, metadata={"team": "x"}, model={"id": "other/model"})["id"]
        must_claim(database)

        def ids(**query: str) -> list[str]:
            return [job["id"] for job in client.get("/v1/jobs", params=query).json()["data"]]

        assert ids(**{"metadata[team]": "x"}) == [b, a]
        assert ids(**{"metadata[team]": "x", "metadata[run.id]": "1"}) == [a]
        assert ids(model="other/model") == [b]
        assert ids(status="running") == [a]
        assert ids(status="succeeded") == []
        assert client.get("/v1/jobs", params={"status": "done"}).status_code == 422

    def test_pages_neither_skip_nor_repeat_while_jobs_are_added(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        wanted = [queue_job(database).id for _ in range(7)]
        seen: list[str] = []
        query: dict[str, Any] = {"limit": 3}
        while True:
            page = client.get("/v1/jobs", params=query).json()
            seen += [job["id"] for job in page["data"]]
            queue_job(database)
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert seen == wanted[::-1]

    def test_ascending_pages_end_with_what_was_added(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        wanted = [queue_job(database).id for _ in range(3)]
        first = client.get("/v1/jobs", params={"order": "asc", "limit": 2}).json()
        wanted.append(queue_job(database).id)
        query = {"order": "asc", "limit": 2, "after": first["last_id"]}
        second = client.get("/v1/jobs", params=query).json()
        assert [job["id"] for job in first["data"] + second["data"]] == wanted
        assert second["has_more"] is False

    def test_an_unknown_cursor_is_an_error(self, client: TestClient) -> None:
        response = client.get("/v1/jobs", params={"after": "job_" + "0" * 26})
        assert (response.status_code, response.json()["code"]) == (400, "invalid_cursor")


class TestCancelAndRetry:
    def test_cancelling_twice_is_once(self, client: TestClient) -> None:
        path = f"/v1/jobs/{post_job(client)['id']}"
        assert client.post(f"{path}/cancel").status_code == 200
        again = client.post(f"{path}/cancel")
        assert (again.status_code, again.json()["status"]) == (200, "cancelled")
        assert again.json()["version"] == client.get(path).json()["version"]

    def test_a_running_job_is_cancelling_first(self, client: TestClient, database: SyncDatabase) -> None:
        job = post_job(client)
        must_claim(database)
        response = client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (response.status_code, response.json()["status"]) == (202, "cancelling")
        assert response.json()["cancel_requested_at"] is not None

    def test_what_has_ended_cannot_be_cancelled(self, client: TestClient, database: SyncDatabase) -> None:
        job = complete(database, post_job(client)["id"])
        response = client.post(f"/v1/jobs/{job.id}/cancel")
        assert (response.status_code, response.json()["code"]) == (409, "conflict")

    def test_a_failed_job_shows_why_and_can_be_retried(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job = post_job(client)
        unreachable = Failure(JobErrorCode.BUDGET_UNREACHABLE, "No plan.", retryable=False, best=0.07)
        database.write(fail, advance(database, job["id"], StepName.PACKAGE), unreachable, POLICY)
        failed = client.get(f"/v1/jobs/{job['id']}").json()
        assert (failed["status"], failed["error"]["code"], failed["error"]["best"]) == (
            "failed",
            "budget_unreachable",
            0.07,
        )
        assert failed["result"]["profile_id"] is not None
        retried = client.post(f"/v1/jobs/{job['id']}/retry")
        assert (retried.status_code, retried.json()["status"], retried.json()["attempt"]) == (
            202,
            "queued",
            2,
        )
        assert client.post(f"/v1/jobs/{job['id']}/retry").status_code == 409


class TestEvents:
    def test_pages_are_gapless(self, client: TestClient, database: SyncDatabase) -> None:
        job_id = post_job(client)["id"]
        complete(database, job_id)
        seen: list[int] = []
        query = {"after": 0, "limit": 4}
        while True:
            page = client.get(f"/v1/jobs/{job_id}/events", params=query).json()
            seen += [event["seq"] for event in page["data"]]
            query["after"] = page["last_seq"]
            if not page["has_more"]:
                break
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) > 10

    def test_a_stream_has_all_events_and_ends_with_the_job(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job_id = post_job(client)["id"]
        timer = threading.Timer(0.2, complete, [database, job_id])
        timer.start()
        events = stream(client, job_id)
        timer.join()
        assert [event["id"] for event in events] == [str(n) for n in range(1, len(events) + 1)]
        assert events[0]["event"] == "job.created"
        assert events[-1]["event"] == "job.succeeded"

    def test_a_stream_resumes_after_the_last_event_id(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job_id = post_job(client)["id"]
        complete(database, job_id)
        everything = stream(client, job_id)
        rest = stream(client, job_id, {"Last-Event-ID": "5"}, after=1)
        assert rest == everything[5:]
        ended = client.get(
            f"/v1/jobs/{job_id}/events",
            headers={"Accept": "text/event-stream", "Last-Event-ID": str(len(everything))},
        )
        assert ended.status_code == 204

    def test_streams_are_limited_and_freed(self, client: TestClient, database: SyncDatabase) -> None:
        from app.jobs.event_routes import StreamSlots

        client.app.state.streams = StreamSlots(1, 1)  # type: ignore[attr-defined]
        job_id = post_job(client)["id"]
        complete(database, job_id)
        for _ in range(3):
            assert stream(client, job_id)
        client.app.state.streams = StreamSlots(0, 1)  # type: ignore[attr-defined]
        response = client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")


def stream(
    client: TestClient, job_id: str, headers: dict[str, str] | None = None, after: int = 0
) -> list[dict[str, str]]:
    response = client.get(
        f"/v1/jobs/{job_id}/events",
        params={"after": after},
        headers={"Accept": "text/event-stream", **(headers or {})},
    )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


def test_the_service_itself_reads_what_it_wrote(database: SyncDatabase) -> None:
    job = queue_job(database, metadata={"a": "b"})
    assert database.read(service.get, job_id=job.id, principal=local_principal()) == job


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"type": "oblique", "parameterisation": "predictor"}},
        {"method": {"type": "eigen", "steps": 3}},
        {"method": {"type": "weighted", "steps": 3}},
        {"dataset": {"source": "self", "num_samples": 1, "sequence_length": 64}},
    ],
)
def test_what_no_worker_could_run_is_refused_at_once(client: TestClient, change: dict[str, Any]) -> None:
    response = client.post("/v1/jobs", json=job_body(**change))
    assert response.status_code == 422, response.text


def test_the_methods_are_those_of_the_library() -> None:
    offered = get_args(Method.model_fields["type"].annotation)
    assert set(offered) == set(METHODS)
    assert [n for n in offered if "parameterisation" in METHODS[n].__dataclass_fields__] == ["stiefel"]
