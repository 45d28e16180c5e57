"""The asynchronous client. The synchronous one is made from this file by `make client`."""

from __future__ import annotations

from orthokv_client.connection_async import AsyncConnection
from orthokv_client.protocol import Retry, Settings
from orthokv_client.resources_async import (
    AsyncApiKeys,
    AsyncArtifacts,
    AsyncAuditEvents,
    AsyncCheckpoints,
    AsyncDatasets,
    AsyncJobs,
    AsyncProfiles,
    AsyncProjects,
    AsyncWebhookEndpoints,
)


class AsyncOrthoKV(AsyncConnection):
    """One server: `async with AsyncOrthoKV(url) as client: ...`.

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
        self.jobs = AsyncJobs(self)
        self.datasets = AsyncDatasets(self)
        self.profiles = AsyncProfiles(self)
        self.checkpoints = AsyncCheckpoints(self)
        self.artifacts = AsyncArtifacts(self)
        self.api_keys = AsyncApiKeys(self)
        self.projects = AsyncProjects(self)
        self.webhook_endpoints = AsyncWebhookEndpoints(self)
        self.audit_events = AsyncAuditEvents(self)
