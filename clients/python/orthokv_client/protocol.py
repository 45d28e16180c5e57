"""What both clients do between a call and its result, without any input or output of their own."""

from __future__ import annotations

import os
import random
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from orthokv_client.base import Model
from orthokv_client.errors import ApiError, UnexpectedAnswer, Unreachable, error_class
from orthokv_client.models import FieldProblem
from orthokv_client.own_token import own_token

AnyModel = TypeVar("AnyModel", bound=Model)

DEFAULT_URL = "http://127.0.0.1:8000"
_KEY = re.compile(r"okv_[0-9a-z]+_[0-9A-Za-z]+_[0-9A-Za-z]+", re.ASCII)
LONGEST_WAIT_SECONDS = 30.0  # of a long poll


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a request is repeated.

    Repeated are requests that got no connection, and 429 and 503 with what `Retry-After` asks for, up to
    `longest_seconds`; where a repetition is harmless, also those whose answer was lost, and other gateway errors.
    `attempts` counts the first one. Pauses double from `first_seconds`, with jitter.
    """

    attempts: int = 5
    first_seconds: float = 0.25
    longest_seconds: float = 10.0

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt after this many failures."""
        longest = min(self.longest_seconds, self.first_seconds * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


PATIENT = Retry(attempts=12)
"""About a minute: for what waits on a job anyway, so that a server may be restarted meanwhile."""


@dataclass(frozen=True)
class Settings:
    """One server and how to talk to it."""

    url: str
    api_key: str | None = field(repr=False)
    timeout_seconds: float
    retry: Retry
    own_token: httpx2.Auth | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str | None, api_key: str | None, timeout_seconds: float, retry: Retry) -> Settings:
        """Gaps are filled by ORTHOKV_URL and ORTHOKV_API_KEY, and on the loopback by the token of the user's own server.

        Raises `ValueError`, which never repeats a key.
        """
        url = url or os.environ.get("ORTHOKV_URL") or DEFAULT_URL
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not the URL of a server, such as {DEFAULT_URL}")
        if api_key is None:
            api_key = os.environ.get("ORTHOKV_API_KEY", "").strip() or None
        if api_key is not None and not is_api_key(api_key):
            raise ValueError("not an API key: one begins with okv_")
        token = own_token(url) if api_key is None else None
        return cls(url, api_key, timeout_seconds, retry, token)

    def options(self) -> dict[str, Any]:
        """Arguments of an HTTP client that sends the key, to this server and no other."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {
            "base_url": self.url,
            "headers": {"Accept": "application/json", "User-Agent": "orthokv-client", **headers},
            "auth": self.own_token,
            "follow_redirects": False,
            # Answers to a long poll come late by design.
            "timeout": httpx2.Timeout(self.timeout_seconds, read=self.timeout_seconds + LONGEST_WAIT_SECONDS),
        }


@dataclass(frozen=True)
class Call:
    """One request. `harmless`: sent twice it does no more than once."""

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    harmless: bool = True

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of an HTTP client's `request`."""
        query = {name: value for name, value in self.query.items() if value is not None}
        arguments: dict[str, Any] = {"params": query, "headers": dict(self.headers)}
        if self.body is not None:
            arguments["json"] = self.body
        return arguments


def is_api_key(text: str) -> bool:
    """Whether a text has the form of a key. A text that has not is not sent anywhere."""
    return _KEY.fullmatch(text) is not None


def creation(path: str, body: Model, idempotency_key: str | None) -> Call:
    """A POST that makes something once, however often it is sent."""
    key = idempotency_key or uuid.uuid4().hex
    return Call("POST", path, body=dumped(body), headers={"Idempotency-Key": key})


def dumped(body: Model) -> dict[str, Any]:
    """A body with what was set, so that the defaults are the server's."""
    return body.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Attempts:
    """Decides after every attempt at a call what comes next."""

    def __init__(self, call: Call, settings: Settings, retry: Retry | None = None) -> None:
        self._call, self._settings = call, settings
        self._retry = retry or settings.retry
        self._failures = 0

    def failed(self, error: httpx2.TransportError) -> float:
        """Seconds until the next attempt. Raises `Unreachable`."""
        self._failures += 1
        never_sent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
        if self._failures >= self._retry.attempts or not (never_sent or self._call.harmless):
            raise Unreachable(
                f"cannot reach {self._settings.url}: {error or type(error).__name__}"
            ) from error
        return self._retry.pause(self._failures)

    def refused(self, response: httpx2.Response) -> float:
        """As `failed`, after an answer that is not a success and was read. Raises `ApiError` and `UnexpectedAnswer`."""
        self._failures += 1
        error = problem(response)
        may_pass = response.status_code in (429, 503) or (
            response.status_code in (502, 504) and self._call.harmless
        )
        if response.status_code == 503 and not self._call.harmless and error.retry_after_seconds is None:
            may_pass = False
        pause = max(self._retry.pause(self._failures), error.retry_after_seconds or 0.0)
        if not may_pass or self._failures >= self._retry.attempts or pause > self._retry.longest_seconds:
            raise error
        return pause


def problem(response: httpx2.Response) -> ApiError:
    """The error of an answer that was read."""
    status = response.status_code
    retry_after = _seconds(response.headers.get("Retry-After"))
    try:
        body = response.json()
        errors = [FieldProblem.model_validate(item, extra="ignore") for item in body["errors"]]
        fields = "".join(f" {item.pointer} {item.message}." for item in errors)
        detail, code, request_id = f"{body['detail']}{fields}", str(body["code"]), body["request_id"]
    except (ValueError, KeyError, TypeError):  # a proxy's page, or a redirect
        detail, code, request_id, errors = f"the server answered {status}", "unknown", None, []
    return error_class(status)(
        detail,
        status=status,
        code=code,
        request_id=request_id,
        errors=errors,
        retry_after_seconds=retry_after,
    )


def parsed(response: httpx2.Response, model: type[AnyModel]) -> AnyModel:
    """The body of a successful answer. Raises `UnexpectedAnswer`."""
    try:
        body = response.json()
    except ValueError as error:
        raise UnexpectedAnswer("the server's answer is no JSON") from error
    return validated(body, model)


def validated(body: Any, model: type[AnyModel]) -> AnyModel:
    """A body; fields that this version does not know are left out. Raises `UnexpectedAnswer`."""
    try:
        return model.model_validate(body, extra="ignore")
    except ValidationError as error:
        raise UnexpectedAnswer(f"the server's answer is no {model.__name__}") from error


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
