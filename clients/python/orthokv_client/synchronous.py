"""The synchronous client. Generated from asynchronous.py by `make client`: do not edit."""

from __future__ import annotations

from orthokv_client.connection import Connection
from orthokv_client.protocol import Retry, Settings
from orthokv_client.resources import (
    ApiKeys,
    Artifacts,
    AuditEvents,
    Checkpoints,
    Datasets,
    Jobs,
    Profiles,
    Projects,
    WebhookEndpoints,
)


class OrthoKV(Connection):
    """One server: `with OrthoKV(url) as client: ...`.

    `url` is that of ORTHOKV_URL by default, and `api_key` that of ORTHOKV_API_KEY; a server of the same user on the loopback
    needs none. `timeout_seconds` bounds connecting, sending and every wait for bytes. All calls raise `ApiError` (a class of
    it for each kind of problem), `Unreachable` and `UnexpectedAnswer`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 30.0,
        retry: Retry = Retry(),
    ) -> None:
        super().__init__(Settings.of(url, api_key, timeout_seconds, retry))
        self.jobs = Jobs(self)
        self.datasets = Datasets(self)
        self.profiles = Profiles(self)
        self.checkpoints = Checkpoints(self)
        self.artifacts = Artifacts(self)
        self.api_keys = ApiKeys(self)
        self.projects = Projects(self)
        self.webhook_endpoints = WebhookEndpoints(self)
        self.audit_events = AuditEvents(self)
