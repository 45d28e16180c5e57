"""Problems: every answer outside 2xx and 3xx is `application/problem+json` (RFC 9457) with a code of a closed
list.

No problem repeats a value that the client sent: it may hold a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.infra.counted import PROBLEMS
from app.infra.keys import redact

log = structlog.get_logger(__name__)

PROBLEM_JSON = "application/problem+json"
_TYPE_BASE = "urn:orthokv:problem:"


class Code(StrEnum):
    """What went wrong, for programs."""

    BAD_REQUEST = "bad_request"
    INVALID_HOST = "invalid_host"
    INVALID_CURSOR = "invalid_cursor"
    INVALID_IDEMPOTENCY_KEY = "invalid_idempotency_key"
    UNAUTHENTICATED = "unauthenticated"
    FOREIGN_ORIGIN = "foreign_origin"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    QUOTA_EXCEEDED = "quota_exceeded"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    CONFLICT = "conflict"
    DATASET_NOT_READY = "dataset_not_ready"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    INVALID_REQUEST = "invalid_request"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    DIGEST_MISMATCH = "digest_mismatch"
    LOCAL_MODELS_DISABLED = "local_models_disabled"
    WEBHOOKS_DISABLED = "webhooks_disabled"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    STORAGE_ERROR = "storage_error"


_STATUS: dict[Code, int] = {
    Code.BAD_REQUEST: 400,
    Code.INVALID_HOST: 400,
    Code.INVALID_CURSOR: 400,
    Code.INVALID_IDEMPOTENCY_KEY: 400,
    Code.UNAUTHENTICATED: 401,
    Code.FOREIGN_ORIGIN: 403,
    Code.INSUFFICIENT_SCOPE: 403,
    Code.QUOTA_EXCEEDED: 403,
    Code.NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.NOT_ACCEPTABLE: 406,
    Code.CONFLICT: 409,
    Code.DATASET_NOT_READY: 409,
    Code.BODY_TOO_LARGE: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.RANGE_NOT_SATISFIABLE: 416,
    Code.INVALID_REQUEST: 422,
    Code.IDEMPOTENCY_KEY_REUSED: 422,
    Code.DIGEST_MISMATCH: 422,
    Code.LOCAL_MODELS_DISABLED: 422,
    Code.WEBHOOKS_DISABLED: 422,
    Code.QUEUE_FULL: 429,
    Code.RATE_LIMITED: 429,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.STORAGE_ERROR: 507,
}


for _code in Code:
    PROBLEMS.labels(_code)  # from zero, so that the first one shows as a rise


class FieldProblem(BaseModel):
    """One field at fault; `pointer` is a JSON pointer into the body, or names the parameter."""

    pointer: str
    code: str
    message: str


class ProblemDetail(BaseModel):
    """Body of every problem."""

    type: str = Field(examples=[_TYPE_BASE + "not-found"])
    title: str = Field(examples=["Not found"])
    status: int = Field(examples=[404])
    code: Code
    detail: str = Field(examples=["No such job."])
    instance: str = Field(examples=["/v1/jobs/job_0"])
    request_id: str
    errors: list[FieldProblem] = []


class Problem(Exception):
    """Raise it anywhere below a route; the answer follows from the code."""

    def __init__(
        self,
        code: Code,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldProblem] = (),
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = _STATUS[code]
        self.detail = detail
        self.headers = dict(headers or {})
        self.errors = list(errors)


def not_found(what: str) -> Problem:
    return Problem(Code.NOT_FOUND, f"No such {what}.")


def render(problem: Problem, *, path: str, request_id: str) -> Response:
    """The response of a problem."""
    PROBLEMS.labels(problem.code).inc()
    body = ProblemDetail(
        type=_TYPE_BASE + problem.code.replace("_", "-"),
        title=problem.code.replace("_", " ").capitalize(),
        status=problem.status,
        code=problem.code,
        detail=problem.detail,
        instance=path,
        request_id=request_id,
        errors=problem.errors,
    )
    return Response(
        redact(body.model_dump_json()),  # a path or a field's name may hold what should have been a header
        status_code=problem.status,
        headers={**problem.headers, "X-Request-Id": request_id},
        media_type=PROBLEM_JSON,
    )


def documented(*codes: Code) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that may answer these codes, besides those that any route may answer."""
    always = (Code.INVALID_HOST, Code.INVALID_REQUEST, Code.INTERNAL, Code.UNAVAILABLE)
    by_status: dict[int | str, list[str]] = {}
    for code in (*codes, *always):
        by_status.setdefault(_STATUS[code], []).append(f"`{code}`")
    return {
        status: {
            "description": f"{HTTPStatus(int(status)).phrase}: {', '.join(dict.fromkeys(names))}",
            "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemDetail"}}},
        }
        for status, names in sorted(by_status.items(), key=lambda item: int(item[0]))
    }


_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_HTTP_CODES: dict[int, tuple[Code, str]] = {
    404: (Code.NOT_FOUND, "No such resource."),
    405: (Code.METHOD_NOT_ALLOWED, "This resource does not have this method."),
    413: (Code.BODY_TOO_LARGE, "The body is larger than this resource accepts."),
}
# Messages of these kinds quote the input.
_QUOTING = {"union_tag_invalid": "is none of the accepted types", "json_invalid": "is not valid JSON"}


def _field_problem(error: dict[str, Any]) -> FieldProblem:
    place, *path = error["loc"]
    if error["type"] == "json_invalid":
        path = []  # an offset in the text, which is not a place in a document
    if place == "body":
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
    else:
        pointer = f"{place}:{'.'.join(map(str, path))}"
    return FieldProblem(
        pointer=pointer,
        code=error["type"],
        message=_QUOTING.get(error["type"], error["msg"].removeprefix("Value error, ")),
    )


def _from_validation(request: Request, error: RequestValidationError) -> Problem:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and any(item["loc"] == ("body",) for item in error.errors()):
        return Problem(
            Code.UNSUPPORTED_MEDIA_TYPE,
            "Send the body as JSON, with the header Content-Type: application/json.",
        )
    fields = [_field_problem(item) for item in error.errors()]
    return Problem(Code.INVALID_REQUEST, "The request does not fit its schema.", errors=fields)


def _from_http(request: Request, error: HTTPException) -> Problem:
    code, detail = _HTTP_CODES.get(error.status_code, (Code.BAD_REQUEST, "The request cannot be read."))
    headers = dict(error.headers or {})
    if code is Code.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return Problem(code, detail, headers=headers)


def _methods(request: Request) -> set[str]:
    """All methods of a path: each of its routes alone knows only its own."""
    found: set[str] = set()
    for method in _METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return found


def request_id_of(request: Request) -> str:
    return str(request.state.request_id)


def install(app: FastAPI) -> None:
    """Register the handlers on the app."""

    def answer(request: Request, problem: Problem) -> Response:
        return render(problem, path=request.url.path, request_id=request_id_of(request))

    @app.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _from_validation(request, error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return answer(request, _from_http(request, error))

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    async def on_database(request: Request, error: OperationalError | PoolTimeout) -> Response:
        reason = error.orig if isinstance(error, OperationalError) else error
        log.error("database.unavailable", request_id=request_id_of(request), error=str(reason))
        unavailable = Problem(
            Code.UNAVAILABLE, "The database does not answer; try again.", headers={"Retry-After": "5"}
        )
        return answer(request, unavailable)

    @app.exception_handler(DataError)
    async def on_value(request: Request, error: DataError) -> Response:
        log.warning("database.value_refused", request_id=request_id_of(request), error=str(error.orig))
        return answer(request, Problem(Code.INVALID_REQUEST, "A value of the request cannot be stored."))

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> Response:
        log.error("request.failed", request_id=request_id_of(request), exc_info=error)
        return answer(
            request, Problem(Code.INTERNAL, "The server failed; the request id finds it in the log.")
        )
