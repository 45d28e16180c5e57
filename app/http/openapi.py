"""The OpenAPI document: built from the routes, with links and the schemas that only problems use."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.http.errors import ProblemDetail

API_VERSION = "1.0.0"

# Where an id in a path comes from: (operation, status, place in its answer).
_SOURCES: dict[str, list[tuple[str, str, str]]] = {
    "job_id": [("jobs.create", "201", "/id"), ("jobs.list", "200", "/data/0/id")],
    "dataset_id": [("datasets.create", "201", "/id")],
    "profile_id": [("profiles.list", "200", "/data/0/id")],
    "checkpoint_id": [("checkpoints.list", "200", "/data/0/id")],
    "artifact_id": [
        ("checkpoints.files", "200", "/data/0/id"),
        ("jobs.layers", "200", "/data/0/artifact_id"),
    ],
    "key_id": [("api_keys.create", "201", "/id")],
    "project_id": [("projects.create", "201", "/id")],
}


def _link(document: dict[str, Any]) -> None:
    """Say of each answer with an id which operations take it (OpenAPI's links)."""
    operations = {
        operation["operationId"]: (path, operation)
        for path, methods in document["paths"].items()
        for operation in methods.values()
    }
    for parameter, sources in _SOURCES.items():
        takers = [name for name, (path, _) in operations.items() if f"{{{parameter}}}" in path]
        for source, status, place in sources:
            links = operations[source][1]["responses"][status].setdefault("links", {})
            for name in takers:
                links[name] = {
                    "operationId": name,
                    "parameters": {parameter: f"$response.body#{place}"},
                }


def describe(api: FastAPI) -> None:
    """Let the app serve its document with the schemas that only problems use."""

    def build() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(
                title=api.title, version=api.version, description=api.description, routes=api.routes
            )
            schemas = document["components"]["schemas"]
            problem = ProblemDetail.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"))
            schemas["ProblemDetail"] = problem
            document["components"]["schemas"] = dict(sorted(schemas.items()))
            _link(document)
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = build  # type: ignore[method-assign]  # FastAPI's own way to extend the document
