"""What a request can end with other than an answer."""

from __future__ import annotations

from collections.abc import Sequence

from orthokv_client.models import FieldProblem


class ClientError(Exception):
    """Everything that this client raises of its own."""


class Unreachable(ClientError):
    """No answer, also after repeating the request."""


class UnexpectedAnswer(ClientError):
    """An answer that is none of this API: another server, or a version that does not fit."""


class DigestMismatch(ClientError):
    """A downloaded file is not the file that the server described. It was deleted."""


class NotEnoughSpace(ClientError):
    """The disk has no room for a download. Nothing was downloaded."""


class DownloadInUse(ClientError):
    """Another process downloads the same file to the same place."""


class TokenUnreadable(ClientError):
    """The file with the token of a server on the loopback is not there or not for this user's eyes. Nothing was sent."""


class ApiError(ClientError):
    """The server answered with a problem (RFC 9457).

    `code` is of the server's closed list; `request_id` finds the request in its log; `errors` names fields at fault;
    `retry_after_seconds` is when to come back, if the server said so.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        request_id: str | None = None,
        errors: Sequence[FieldProblem] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.errors = list(errors)
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ApiError):
    """400, 406, 413, 415, 416, 422: the request has to be another one."""


class Unauthenticated(ApiError):
    """401: no API key, or none that is valid."""


class Forbidden(ApiError):
    """403: the key lacks a scope, or its project has no quota left."""


class NotFound(ApiError):
    """404: there is no such thing in the key's project."""


class Conflict(ApiError):
    """409: not in the state that this thing is in."""


class TooManyRequests(ApiError):
    """429: the queue is full or the key's rate is used up."""


class ServerError(ApiError):
    """5xx: the server failed, or cannot answer now."""


class StoreRefused(ApiError):
    """The object store refused the URL that the server had signed for it."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: TooManyRequests,
}


def error_class(status: int) -> type[ApiError]:
    if status >= 500:
        return ServerError
    return _BY_STATUS.get(status, InvalidRequest)
